# GNU make. "make" alone tells what there is.
#
# Nothing has to be installed by hand but Go, git and make on Debian: demo and
# test install the Debian packages that they miss, as root or through sudo.

GO ?= $(or $(shell command -v go),/usr/local/go/bin/go)
BIN ?= bin/pgha
# Outside of git, and in another user's clone, there is no revision to tell.
VERSION ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),dev)

# What the tests run, beside what the Go programs among them bring along.
TEST_PACKAGES = \
	postgresql patroni python3-etcd python3-dnspython python3-idna haproxy nftables \
	debootstrap systemd systemd-container dbus util-linux mount iproute2 procps \
	openssl ca-certificates python3 python3-yaml gcc libc6-dev e2fsprogs

# As a user, only what needs it runs as root: compiling does not.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
ROOT_EXEC := $(if $(SUDO),-exec 'sudo -E')

# Room for two cores that whole clusters share; a run that hangs shows its
# goroutines. Tests of clusters wait most of the time: two packages at once.
GO_TEST = $(GO) test -race -timeout 40m $(ROOT_EXEC)
SCENARIOS = ./tests/day2/... ./tests/e2e/... ./tests/systemd/... ./tests/faults/... ./tests/cluster/...

LINT = $(GO) tool -modfile=tools/go.mod golangci-lint

.DEFAULT_GOAL := help
.PHONY: help build demo test debian13 soak unit scenarios deps check fmt-check vet lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/pgha, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X pgha/node.Version=$(VERSION)' -o $(BIN) ./cmd/pgha
	@LC_ALL=C ldd $(BIN) 2>&1 | grep -Eq 'not a dynamic|statically' || { echo "$(BIN) is not static" >&2; exit 1; }

demo: build ## bring up a real three-node cluster on this machine and pull its primary's plug
	$(SUDO) $(BIN) demo --yes

test: deps build vet unit scenarios ## install what the tests need and run them all

unit: ## test the packages
	$(GO_TEST) $$($(GO) list ./... | grep -v ^pgha/tests/) ./tests/deps
# The schedules of the simulation are many, and have no goroutines to race.
	$(GO) test -timeout 30m -v -run 'Simulation|Mutations' ./gate

scenarios: build ## test etcd members, whole clusters and booted hosts together
	PGHA_BIN=$(abspath $(BIN)) $(GO_TEST) -v -p 2 $(SCENARIOS)

debian13: deps build ## test the hosts that are booted with systemd on Debian 13
	PGHA_SUITE=trixie PGHA_BIN=$(abspath $(BIN)) $(GO_TEST) -v ./tests/systemd/...

# A run takes hours: ROUNDS=1 does each fault once.
ROUNDS ?= 20
# of the gate's simulation, with seeds that no run has had before
SCHEDULES ?= 5000000

soak: deps build ## do every fault 20 times (ROUNDS) and write docs/FAULTS.md
	PGHA_SCHEDULES=$(SCHEDULES) PGHA_FIRST=$$(date +%s)00000 $(GO) test -timeout 48h -v -run Simulation ./gate
	PGHA_BIN=$(abspath $(BIN)) PGHA_SOAK=$(ROUNDS) $(GO) test -race -timeout 48h $(ROOT_EXEC) -v -run TestFaults ./tests/faults
	PGHA_BIN=$(abspath $(BIN)) PGHA_SOAK=$(ROUNDS) $(GO) test -race -timeout 2h $(ROOT_EXEC) -v -run TestReactions ./tests/e2e

deps: ## install the Debian packages that the tests need
	@$(GO) build -buildvcs=false -o bin/install-packages ./tests/packages
	@$(SUDO) bin/install-packages $(TEST_PACKAGES)

check: fmt-check vet lint ## format, vet and lint

fmt-check:
	@out=$$(find . -name '*.go' -not -path './.*' -exec gofmt -l {} +); \
	if [ -n "$$out" ]; then echo "not formatted by gofmt:" >&2; echo "$$out" >&2; exit 1; fi

vet: ## run go vet
	$(GO) vet ./...

lint: ## run the linters; the first run builds them
	$(LINT) run

clean: ## remove what the build and the tests keep
	$(SUDO) rm -rf bin .cache
