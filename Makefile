# conenatd: three commands for a fresh Debian 12 with Go.
#
#   sudo make demo    show in a throw-away lab what conenatd does
#   make check        what needs neither root nor a minute or two
#   sudo make test    all checks and tests
#
# Each installs what it needs: Debian packages by name, Go modules.

# sudo often leaves /usr/local/go/bin out of PATH.
GO ?= $(shell command -v go || echo /usr/local/go/bin/go)
export GOTOOLCHAIN = local
# The files may belong to another user than root. For 32-bit machines see scripts/mod32.
export GOFLAGS = -buildvcs=false$(if $(filter 386 arm mips mipsle,$(ARCH)), -modfile=$(shell GO='$(GO)' scripts/mod32))
ARCH = $(or $(GOARCH),$(shell $(GO) env GOARCH))

RUN_PACKAGES  = iproute2 nftables conntrack
TEST_PACKAGES = $(RUN_PACKAGES) iptables gcc libc6-dev strace systemd python3 ipset shellcheck busybox-static nix-bin
PAGE_PACKAGES = chromium
BOX_PACKAGES  = git mmdebstrap systemd-container lintian xz-utils
VM_PACKAGES   = qemu-system-x86 qemu-system-arm qemu-system-mips qemu-system-misc busybox-static kmod xz-utils zstd

# What "make kernels" boots: Debian's kernels for amd64 (5.10 6.1 6.12 7.3), and those for
# other machines (armhf, mipsel, s390x), where it runs the selftest.
KERNELS ?= 6.1 armhf mipsel s390x

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOFUMPT     = mvdan.cc/gofumpt@v0.12.0
ERRCHECK    = github.com/kisielk/errcheck@v1.10.0
MISSPELL    = github.com/golangci/misspell/cmd/misspell@v0.8.0

FUZZ_TIME ?= 20000x
SOAK      ?= 3m

# Tests that choose the mode of the daemon themselves.
OWN_MODES = ^Test(Doctor|Explain|Probe|Troubleshooting|LogOf|Unit|NFT|Legacy|GroupOf|AutoNFT|Mend|Offload|Flow|Reflector|Demo|Selftest|ManyPermissions|TablesOf|LinksMay|Recipes|Lean|ManyNewFlows|WatcherThat)

# Tests of all that the kernel and the daemon do with a permission, in which the kernel can hide flows.
# Some take five seconds longer then: "list" looks for hidden flows that often.
LEAN = ^Test(PeerAnswers|TwoInside|Shared|RestartAfterKill|RevokeBy|LimitPer|ChildIs|LiveChildren|Connmark|ForwardThatIsUsedFirst|StopTakes)

# What a program for 386 may do differently: layouts of structures, sizes of integers.
PACKAGES32 = cone ctwatch expect gateway nfnl rules rules/elements userrules
E2E32      = ^Test(Selftest(Passes|Proves)|Legacy|Self(Gets|Judges)|UnitAllows|CapNet|IPv6Routed|NFTHairpin$$|AccountingIsRestored)

.PHONY: build demo check test generate screenshot lint vet cross unit unit32 soak modes fuzz kernels packages packages-test bench clean

# "make TAGS=conenatd_small build" leaves out what a small machine may do without.
SMALL = conenatd_small
PROGRAM ?= bin/conenatd
build:
	$(GO) build -tags=$(TAGS) -o $(PROGRAM) ./cmd/conenatd

demo:
	@scripts/install-deps $(RUN_PACKAGES)
	@$(MAKE) -s build
	@bin/conenatd demo

# The tests that need no lab: those that do are skipped, for root too.
check: lint
	CONENATD_NO_LAB=1 $(GO) test ./cmd/... ./deploy ./internal/...

test: deps lint
	@$(TOGETHER) cross unit32
	@$(MAKE) --no-print-directory unit soak modes fuzz kernels

# Runs targets side by side: most tests wait for the kernel's timeouts for most of their time.
# The output of each is shown when it ends.
TOGETHER = $(MAKE) --no-print-directory --jobs --output-sync=target

.PHONY: deps
deps:
	@scripts/install-deps $(TEST_PACKAGES) $(PAGE_PACKAGES)

# The manual pages, the reference of the configuration, its schema and its example; OpenWrt's list
# of truths, the list of metrics, and the example of the control API that tests compare.
generate:
	$(GO) test -count=1 -run TestGeneratedFilesAreCurrent ./cmd/conenatd -update
	$(GO) test -count=1 -run TestOpenWrtKnowsEveryKey ./deploy -update
	$(GO) test -count=1 -run TestTheDocumentHasTheMetrics ./internal/metrics -update
	$(GO) test -count=1 -run TestTheWordsOfTheWire ./internal/control -update

# The picture of docs/page.md: the page in a browser, while real packets pass.
screenshot:
	@scripts/install-deps $(RUN_PACKAGES) $(PAGE_PACKAGES)
	$(GO) test -count=1 -run TestPageShowsWhatHappens ./e2e/page -update

lint: vet
	@unformatted=$$($(GO) run $(GOFUMPT) -l cmd deploy e2e internal) && if [ -n "$$unformatted" ]; then \
		echo "gofumpt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) run $(STATICCHECK) -checks all ./...
	$(GO) run $(ERRCHECK) -ignoretests -exclude .errcheck ./...
	@$(GO) run $(MISSPELL) -error $$(find . -path ./bin -prune -o -type f \( -name '*.go' -o -name '*.md' -o -name '*.toml' \) -print)

vet:
	$(GO) vet ./...

# Real gateways have all these machines. vet looks at the tests as well, which depend on
# no more than the size of an int and the order of bytes.
cross:
	@for arch in 386 arm mips mipsle arm64 riscv64; do \
		echo "build for $$arch"; $(MAKE) -s GOARCH=$$arch PROGRAM=/dev/null build || exit 1; done
	@for arch in 386 mips; do \
		echo "vet for $$arch"; $(MAKE) -s GOARCH=$$arch vet || exit 1; done
	@for arch in amd64 mipsle; do \
		echo "small build for $$arch"; $(MAKE) -s GOARCH=$$arch PROGRAM=/dev/null TAGS=$(SMALL) build || exit 1; done
	@echo "vet the small build"; $(GO) vet -tags=$(SMALL) ./cmd/... ./internal/...

# The kernels' tests are not among them: they have a target of their own.
# The end-to-end tests are in three parts that take about the same time.
unit:
	@$(TOGETHER) unit-e2e-first unit-e2e-second unit-e2e-rest unit-others

UNIT = $(GO) test -race -count=1 -parallel 4 -timeout 60m
.PHONY: unit-e2e-first unit-e2e-second unit-e2e-rest unit-others
unit-e2e-first:
	$(UNIT) -run '^Test[A-M]' ./e2e
unit-e2e-second:
	$(UNIT) -run '^TestN' ./e2e
unit-e2e-rest:
	$(UNIT) -skip '^Test[A-N]' ./e2e
unit-others:
	$(UNIT) $$($(GO) list ./... | grep -v -e '/e2e$$' -e /e2e/kernels)

# Some tests on this kernel as a program for 386, which has no race detector. The one that is left
# out asks the machine's own nft.
unit32: export GOARCH = 386
unit32:
	$(GO) test -count=1 -timeout 10m -skip '^TestNftLoadsWhatItLists$$' $(PACKAGES32:%=./internal/%)
	$(GO) test -count=1 -timeout 10m -run '$(E2E32)' ./e2e

# Minutes of 5,000 new flows a second, with nothing beside.
soak:
	CONENATD_SOAK=$(SOAK) $(GO) test -count=1 -v -timeout 0 -run TestSoak ./e2e/chaos

# The end-to-end tests once more for each mode but the default, which is auto.
# Those that choose their modes themselves are left out. The race detector has seen the same
# code in "unit".
MODES = mode-expect mode-nft mode-nft-by-event mode-lean
.PHONY: $(MODES)
modes:
	@$(TOGETHER) $(MODES)
mode-expect: MODE = --backend=expect
mode-nft: MODE = --backend=nft
mode-nft-by-event: MODE = --backend=nft --learn=false
mode-lean: MODE = --backend=nft --events=lean
mode-lean: SELECT = -run '$(LEAN)'
$(MODES):
	CONENATD_MODE='$(MODE)' $(GO) test -count=1 -parallel 4 -timeout 25m $(or $(SELECT),-skip '$(OWN_MODES)') ./e2e

# A short run of each fuzz target, from the kept corpora alone: what earlier runs left in Go's
# cache would make one machine differ from another.
fuzz:
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && for target in $$(grep -rl --include='*_test.go' '^func Fuzz' internal | xargs -n1 dirname | sort -u); do \
		for name in $$(grep -h -o '^func Fuzz[A-Za-z0-9_]*' $$target/*_test.go | cut -c6-); do \
			echo "fuzz $$target $$name"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZ_TIME) -fuzzminimizetime 100x ./$$target -args -test.fuzzcachedir="$$cache/$$target/$$name" || exit 1; \
		done; done

# The core tests on Debian's own kernels, in QEMU, and the selftest on other machines.
kernels:
	@scripts/install-deps $(TEST_PACKAGES) $(VM_PACKAGES)
	CONENATD_KERNELS="$(KERNELS)" $(GO) test -count=1 -timeout 200m -v ./e2e/kernels

# Debian and RPM packages, static programs, SBOM and checksums, for all machines.
packages:
	scripts/packages bin/packages

# Needs some minutes: installs, upgrades and removes the package in a container with Debian 12.
packages-test:
	@scripts/install-deps $(TEST_PACKAGES) $(BOX_PACKAGES)
	CONENATD_PACKAGES=1 $(GO) test -count=1 -timeout 30m ./e2e/packages

# Measures what conenatd costs, in about 13 minutes on a quiet machine, and writes
# docs/results/bench.md and its charts.
# BENCH has flags: "make bench BENCH='-tables b -rounds 20'", "make bench BENCH=-help".
bench: build
	@scripts/install-deps $(RUN_PACKAGES)
	$(GO) run ./e2e/bench -exe $(PROGRAM) $(BENCH)

clean:
	rm -rf bin
