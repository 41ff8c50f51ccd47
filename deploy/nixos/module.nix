# conenatd as a service of NixOS. The settings are those of conenatd.toml:
#
#   imports = [ ./conenatd/deploy/nixos/module.nix ];
#   services.conenatd = {
#     enable = true;
#     settings.subnet = [ { prefix = "192.168.1.0/24"; } ];
#   };
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.conenatd;
  format = pkgs.formats.toml { };
  written = format.generate "conenatd.toml" cfg.settings;
  # What is wrong fails here, before anything is switched.
  checked = pkgs.runCommand "conenatd-checked.toml" { } ''
    ${lib.getExe cfg.package} check ${written}
    cp ${written} $out
  '';
in
{
  options.services.conenatd = {
    enable = lib.mkEnableOption "restricted cone NAT for UDP";
    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package of conenatd.";
    };
    settings = lib.mkOption {
      type = format.type;
      default = { };
      example = {
        lifetime = "10m";
        subnet = [ { prefix = "192.168.1.0/24"; } ];
      };
      description = "The keys of conenatd.toml(5).";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = (cfg.settings.subnet or [ ]) != [ ] || (cfg.settings.self or false);
        message = ''services.conenatd.settings.subnet: name an inside network, such as [ { prefix = "192.168.1.0/24"; } ]'';
      }
    ];
    environment.systemPackages = [ cfg.package ];
    environment.etc = {
      "conenatd/conenatd.toml".source = checked;
      "modules-load.d/conenatd.conf".source = ../modules-load.d/conenatd.conf;
      "sysctl.d/50-conenatd.conf".source = ../sysctl.d/conenatd.conf;
    };
    users.users.conenatd = {
      isSystemUser = true;
      group = "conenatd";
    };
    users.groups.conenatd = { };
    systemd.packages = [ cfg.package ];
    systemd.services.conenatd = {
      wantedBy = [ "multi-user.target" ];
      reloadTriggers = [ checked ];
    };
  };
}
