# The everyday commands. Each does its own set-up: as root on Debian nothing but Rust must be there before.
CARGO ?= cargo

# Not that of the environment: shells have a variable of this name that counts.
SECONDS = 30

.PHONY: help demo test test-calls fuzz lint fmt clippy docs guest bench-api bench-block bench-boot bench-jail bench-memory bench-net bench-path bench-uefi static \
	release reproducible man

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: ## from nothing to a running guest, step by step; hands over its console if there is a terminal
	@tests/demo/run

test: ## unit tests, tests with real guests (on KVM, or in the laboratory), and the laboratory's own
	@tests/run

test-calls: ## the same, and whether each rule of the system-call filters is needed, which takes a sixth longer
	@RACKVISOR_COUNT_CALLS=1 tests/run

fuzz: ## fuzzes all that a guest, client or peer can send, each target for SECONDS=30 (fuzz/README.md)
	@fuzz/run --seconds $(SECONDS)

lint: fmt clippy docs ## formatting, clippy and documentation, warnings are errors

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

docs:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --locked

bench-uefi: ## time to GRUB by UEFI firmware, beside QEMU
	@benches/uefi

# The C library is Debian's (libc.a of libc6-dev): no other toolchain is needed. Dependencies that run at build time stay dynamic, for
# which the target has to be named.
static: ## release programs without libraries, for jails, in target/x86_64-unknown-linux-gnu/release
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --release --locked --target x86_64-unknown-linux-gnu \
	    -p rackvisor -p rackvisor-api -p rackvisor-jailer --bins

release: ## the release programs of the commit that is checked out, the same bytes everywhere, in out/release
	@resources/release

reproducible: ## the same, twice, and compared
	@resources/release --twice

man: ## the manual pages in resources/man, from the command lines
	UPDATE_MAN=1 $(CARGO) test --locked -p rackvisor -p rackvisor-api -p rackvisor-jailer --bins manual_pages

guest: ## the test guest, in out/guest
	@resources/guest/build

bench-api: ## what clients that hammer the API cost a guest's disk
	@benches/api

bench-block: ## disks, side by side with other VMMs
	@benches/block

bench-boot: ## boot time and memory, side by side with other VMMs
	@benches/boot

bench-memory: ## what each kind of guest RAM costs
	@benches/memory

bench-jail: ## starts in the jail and without
	@benches/jail

bench-net: ## NICs, side by side with other VMMs
	@benches/net

bench-path: ## time and allocations of a disk's request between ring and backend, without a guest
	$(CARGO) bench -p rackvisor-devices --features test-double --bench block_path
