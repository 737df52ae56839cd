//! `rackvisor doctor`: whether this host's KVM can run stock kernels, what is missing, and what to do.

pub mod probe;

use std::fmt;
use std::fs;

use kvm_ioctls::{Cap, Kvm};
use rackvisor_api::config::HypervFeatures;

use self::probe::{Outcome, STEPS};
use crate::cpu::hyperv;
use crate::kvm;

/// Capabilities without which a VM runs, but worse.
const WANTED: [(Cap, &str, &str); 8] = [
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_ANY_LENGTH", "kicks take the slow path: use Linux 4.4 or newer"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER", "guest timers cost more exits: use a newer host kernel"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ", "the guest has to measure its TSC: use a host with a constant TSC"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL", "guests may report soft lockups after a pause"),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API", "no APIC IDs above 254: use Linux 4.7 or newer"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "likewise: use Linux 4.4 or newer"),
    (Cap::X86Smm, "KVM_CAP_X86_SMM", "no firmware with SMM (boot.firmware.smm): use a host kernel with CONFIG_KVM_SMM"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "no AVX for guests: the host CPU lacks XSAVE"),
];

/// What was found.
#[derive(Debug)]
pub struct Report {
    lines: Vec<Line>,
    /// Whether stock kernels can run.
    pub fit: bool,
}

#[derive(Debug)]
struct Line {
    mark: &'static str,
    text: String,
    remedy: Option<String>,
}

/// Examines the host.
#[must_use]
pub fn examine() -> Report {
    let mut report = Report { lines: Vec::new(), fit: true };
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            report.bad(format!("/dev/kvm cannot be opened: {error}"), no_device_remedy());
            return report;
        }
    };
    report.good(format!("/dev/kvm opens, API version {}", kvm.get_api_version()));
    for (cap, name) in kvm::REQUIRED {
        if kvm.check_extension(cap) {
            report.good(name);
        } else {
            report.bad(
                format!("{name} is missing"),
                "no VM can run without it: use the kernel of a current distribution",
            );
        }
    }
    for (cap, name, remedy) in WANTED {
        if kvm.check_extension(cap) {
            report.good(name);
        } else {
            report.add("warn", format!("{name} is missing"), Some(remedy.into()));
        }
    }
    report.good(format!("{} vCPUs at most, {} recommended", kvm.get_max_vcpus(), kvm.get_nr_vcpus()));
    report.hyperv(&kvm);
    match probe::run(&kvm) {
        Ok(Outcome::Complete) => report.good(format!("a test guest could {}", STEPS.join(", "))),
        Ok(Outcome::StoppedAt(step, reason)) => report.bad(
            format!("a test guest could not {}: {reason}", STEPS.get(step).copied().unwrap_or("go on")),
            "this KVM cannot run a stock kernel; use a bare-metal host or nested virtualisation (for tests: tests/lab/run)",
        ),
        Err(error) => report.bad(format!("a test guest could not be made: {error}"), "look at the host's kernel log"),
    }
    report
}

fn no_device_remedy() -> String {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    let remedy = match (has("svm"), has("vmx"), fs::exists("/dev/kvm").unwrap_or(false)) {
        (_, _, true) => "give this user access to /dev/kvm (group kvm)",
        (true, ..) => "modprobe kvm_amd",
        (_, true, _) => "modprobe kvm_intel",
        _ => {
            "this CPU shows no virtualisation: enable SVM or VT-x in the firmware, or nested virtualisation if this is a VM"
        }
    };
    remedy.into()
}

impl Report {
    fn add(&mut self, mark: &'static str, text: String, remedy: Option<String>) {
        self.lines.push(Line { mark, text, remedy });
    }

    fn good(&mut self, text: impl Into<String>) {
        self.add("ok", text.into(), None);
    }

    /// What of Hyper-V guests can see.
    fn hyperv(&mut self, kvm: &Kvm) {
        let all = HypervFeatures { tlbflush_ext: true, ..HypervFeatures::default() };
        match hyperv::missing(kvm, &all) {
            Ok(missing) if missing.is_empty() => self.good("Hyper-V enlightenments: all"),
            Ok(missing) => {
                let remedy = "turn these off in `cpus.hyperv`, or use a newer host kernel; without the others Windows works worse";
                self.add("warn", format!("Hyper-V enlightenments but {}", missing.join(", ")), Some(remedy.into()));
            }
            Err(error) => self.add("warn", format!("no Hyper-V enlightenments: {error}"), None),
        }
    }

    fn bad(&mut self, text: impl Into<String>, remedy: impl Into<String>) {
        self.fit = false;
        self.add("FAIL", text.into(), Some(remedy.into()));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { mark, text, remedy } in &self.lines {
            writeln!(f, "{mark:>4}  {text}")?;
            if let Some(remedy) = remedy {
                writeln!(f, "      {remedy}")?;
            }
        }
        let verdict = if self.fit { "this host can run stock kernels" } else { "this host cannot run stock kernels" };
        writeln!(f, "verdict: {verdict}")
    }
}
