//! A thread of the VMM that panics costs its VM, and nothing else: the VM ends in an orderly way, with its disks flushed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rackvisor::assembly::{DiskStore, HostOptions, StoredDisk};
use rackvisor::telemetry::crash::report_panics;
use rackvisor::{Vm, VmState};
use rackvisor_api::config::DiskConfig;
use rackvisor_devices::PlainThreads;
use rackvisor_devices::block::{BlockBackend, BlockSource, Event, Geometry, Request, Signal};
use serde_json::Value;
use support::{PATIENCE, Place, SPIN};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Disks in memory that nobody reads. The one called `bad` has a bug.
#[derive(Default)]
struct Store {
    bug: Arc<AtomicBool>,
    syncs: Arc<AtomicU32>,
}

impl DiskStore for Store {
    fn open(&self, config: &DiskConfig) -> Option<StoredDisk> {
        let bug = if config.id == "bad" { Arc::clone(&self.bug) } else { Arc::default() };
        let syncs = if config.id == "bad" { Arc::default() } else { Arc::clone(&self.syncs) };
        let backend = move |_: &_| -> Result<Box<dyn BlockBackend>, _> {
            Ok(Box::new(Buggy { bug: Arc::clone(&bug), epoll: Epoll::new().unwrap(), watched: Vec::new() }))
        };
        Some(StoredDisk { source: Arc::new(Source { syncs }), backend: Box::new(backend) })
    }
}

struct Source {
    syncs: Arc<AtomicU32>,
}

impl BlockSource for Source {
    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: 1 << 20,
            logical_block_size: 512,
            physical_block_size: 512,
            alignment_offset: 0,
            min_io: 0,
            opt_io: 0,
            rotational: false,
            read_only: false,
            discard: None,
            write_zeroes: None,
            memory_alignment: 1,
            offset_alignment: 1,
        }
    }

    fn capacity(&self) -> io::Result<u64> {
        Ok(1 << 20)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Buggy {
    bug: Arc<AtomicBool>,
    epoll: Epoll,
    watched: Vec<EventFd>,
}

impl BlockBackend for Buggy {
    fn watch(&mut self, signal: Signal, event: Option<EventFd>) -> io::Result<()> {
        let Some(event) = event else { return Ok(()) };
        let number = u64::from(signal == Signal::Kick);
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, number);
        self.epoll.ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(&event), interest)?;
        self.watched.push(event);
        Ok(())
    }

    #[allow(unsafe_code)] // The trait says so; nothing is done with the memory.
    unsafe fn submit(&mut self, request: Request<'_>) {
        panic!("nobody drives this disk: {request:?}");
    }

    fn wait(&mut self, _timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        let mut ready = [EpollEvent::default(); 2];
        loop {
            assert!(!self.bug.load(Ordering::SeqCst), "the bug of the disk");
            let count = self.epoll.wait(5, &mut ready)?;
            let signals = ready[..count].iter().map(|e| if e.data() == 1 { Signal::Kick } else { Signal::Command });
            events.extend(signals.map(Event::Signal));
            if count > 0 {
                return Ok(());
            }
        }
    }
}

#[test]
fn a_worker_that_panics_ends_its_vm_with_the_disks_flushed_and_leaves_a_report_without_secrets() {
    let Some(place) = Place::new() else { return };
    let store = Arc::new(Store::default());
    let mut config = place.config(SPIN);
    config.boot.as_mut().unwrap().cmdline = "password=hunter2".into();
    config.disks = vec![place.disk("good"), place.disk("bad")];
    let options = HostOptions { disks: Some(Arc::clone(&store) as _), ..HostOptions::default() };
    let vm = Vm::define_with_options(config, Vec::new(), options).unwrap();
    let report = place.folder.path().join("crash");
    report_panics(&report, vm.telemetry(), &PlainThreads).unwrap();
    vm.boot().unwrap();
    assert_eq!(fs::read(&report).unwrap(), b"", "nothing has panicked");
    let before = store.syncs.load(Ordering::SeqCst);

    store.bug.store(true, Ordering::SeqCst);
    vm.wait_for(VmState::Crashed, PATIENCE).unwrap();
    let cause = vm.describe().unwrap().cause.unwrap();
    assert!(cause.starts_with("thread bad.q0 of the VMM panicked"), "{cause}");
    assert_eq!(store.syncs.load(Ordering::SeqCst), before + 1, "the other disk is flushed");
    let text = fs::read_to_string(&report).unwrap();
    assert!(!text.contains("hunter2"), "{text}");
    let told: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!((&told["thread"], &told["message"]), (&"bad.q0".into(), &"the bug of the disk".into()));
    assert_eq!((&told["state"], &told["config"]["name"]), (&"running".into(), &"tiny".into()));
    assert!(told["location"].as_str().unwrap().contains("panics.rs"), "{told}");
    assert!(told["vcpus"][0]["last_exits"].is_array(), "{told}");
    let backtrace = told["backtrace"].as_array().unwrap();
    // A function that the compiler put into another one has its name there without its type's.
    assert!(backtrace.iter().any(|line| line.as_str().unwrap().contains("panics.rs:")), "{told}");

    store.bug.store(false, Ordering::SeqCst);
    vm.boot().unwrap();
    assert_eq!(vm.describe().unwrap().state, VmState::Running, "this process can boot it again");
}
