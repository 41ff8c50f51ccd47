# conenatd as a package of Nix: pkgs.callPackage ./package.nix { }.
{
  lib,
  buildGoModule,
  version ? "0.0.0",
}:

buildGoModule {
  pname = "conenatd";
  inherit version;
  src = lib.cleanSource ../..;
  vendorHash = "sha256-wC00VKabsOkh5O/9J8dgotHPu7t/XyA4x+4Bckq+nco=";

  subPackages = [ "cmd/conenatd" ];
  env.CGO_ENABLED = 0;
  ldflags = [
    "-s"
    "-w"
    "-X main.version=v${version}"
  ];
  # The tests need root and network namespaces.
  doCheck = false;

  postInstall = ''
    install -Dm644 -t $out/share/man/man8 deploy/man/conenatd.8
    install -Dm644 -t $out/share/man/man5 deploy/man/conenatd.toml.5
    install -Dm644 -t $out/lib/systemd/system deploy/systemd/conenatd.service
    substituteInPlace $out/lib/systemd/system/conenatd.service --replace-fail /usr/bin/ $out/bin/
  '';

  meta = {
    description = "Restricted cone NAT for UDP on the stock Linux kernel";
    homepage = "https://github.com/conenatd/conenatd";
    license = lib.licenses.mit;
    mainProgram = "conenatd";
    platforms = lib.platforms.linux;
  };
}
