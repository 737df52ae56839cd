//! Hyper-V enlightenments: what the guest sees of the hypervisor interface that Windows knows (Hypervisor Top-Level
//! Functional Specification).

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::problem::{Pointer, Problem};

/// The vendor that guests which look at it expect.
pub const HYPERV_VENDOR: &str = "Microsoft Hv";

/// Whether the guest sees a Hyper-V: `true` for all that has a default of true, `false` for nothing, or each feature by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum HypervConfig {
    /// With the default features, or not at all.
    Switch(bool),
    /// With these features.
    Features(HypervFeatures),
}

/// What the guest may use of Hyper-V's interface. The guest sees just this on every host; a host whose KVM lacks some of it
/// is told so at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HypervFeatures {
    /// The vendor that CPUID names: 1 to 12 bytes of printable ASCII. Linux takes it for Hyper-V only with the default.
    #[schema(min_length = 1, max_length = 12, default = "Microsoft Hv")]
    pub vendor: String,
    /// No watchdog of the guest is to count on time passing evenly.
    #[schema(default = true)]
    pub relaxed: bool,
    /// Registers of the APIC as MSRs, and the assist page.
    #[schema(default = true)]
    pub vapic: bool,
    /// The guest tells of spinlocks that it waits for.
    #[schema(default = true)]
    pub spinlocks: bool,
    /// The guest can ask which vCPU it is on.
    #[schema(default = true)]
    pub vpindex: bool,
    /// The guest can ask how long its vCPU has run.
    #[schema(default = true)]
    pub runtime: bool,
    /// The synthetic interrupt controller. Needs `vpindex`.
    #[schema(default = true)]
    pub synic: bool,
    /// Synthetic timers: without them Windows keeps its time by the RTC. Needs `synic` and `time`.
    #[schema(default = true)]
    pub stimer: bool,
    /// Synthetic timers that interrupt without a message. Needs `stimer`.
    #[schema(default = true)]
    pub stimer_direct: bool,
    /// The reference counter, and the page by which it is read without an exit.
    #[schema(default = true)]
    pub time: bool,
    /// Reset by MSR.
    #[schema(default = true)]
    pub reset: bool,
    /// The frequencies of TSC and APIC timer by MSRs.
    #[schema(default = true)]
    pub frequencies: bool,
    /// Flushing the TLBs of other vCPUs by hypercall. Needs `vpindex`.
    #[schema(default = true)]
    pub tlbflush: bool,
    /// The same for ranges of addresses. Needs `tlbflush`, and Linux 6.2 or newer on the host.
    #[schema(default = false)]
    pub tlbflush_ext: bool,
    /// Interrupts between vCPUs by hypercall. Needs `vpindex`.
    #[schema(default = true)]
    pub ipi: bool,
    /// Input of hypercalls in XMM registers.
    #[schema(default = true)]
    pub xmm_input: bool,
    /// The guest is asked not to use automatic ends of interrupts, with which the CPU cannot deliver interrupts by itself.
    #[schema(default = true)]
    pub apicv: bool,
    /// The guest tells the parameters of its crash: a `guest-panicked` event, and `guest_panic` in `GET /v1/vm`.
    #[schema(default = true)]
    pub crash: bool,
    /// Guests with Hyper-V in them are told when the frequency of the TSC changes.
    #[schema(default = true)]
    pub reenlightenment: bool,
    /// KVM's own interface as well, at another place in CPUID. Linux takes it where it finds both.
    #[schema(default = true)]
    pub kvm: bool,
}

impl Default for HypervFeatures {
    fn default() -> Self {
        Self {
            vendor: HYPERV_VENDOR.into(),
            relaxed: true,
            vapic: true,
            spinlocks: true,
            vpindex: true,
            runtime: true,
            synic: true,
            stimer: true,
            stimer_direct: true,
            time: true,
            reset: true,
            frequencies: true,
            tlbflush: true,
            tlbflush_ext: false,
            ipi: true,
            xmm_input: true,
            apicv: true,
            crash: true,
            reenlightenment: true,
            kvm: true,
        }
    }
}

impl Default for HypervConfig {
    fn default() -> Self {
        Self::Switch(false)
    }
}

impl HypervConfig {
    /// The features that the guest sees, if it sees a Hyper-V.
    pub fn features(&self) -> Option<HypervFeatures> {
        match self {
            Self::Switch(on) => on.then(HypervFeatures::default),
            Self::Features(features) => Some(features.clone()),
        }
    }

    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        match self {
            Self::Switch(_) => Ok(()),
            Self::Features(features) => features.check(at),
        }
    }
}

impl HypervFeatures {
    fn check(&self, at: &Pointer) -> Result<(), Problem> {
        let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        if !(1..=12).contains(&self.vendor.len()) || !self.vendor.bytes().all(printable) {
            let remedy = format!("use 1 to 12 bytes of printable ASCII, such as \"{HYPERV_VENDOR}\"");
            return Err(Problem::invalid(&at.key("vendor"), "this vendor is not possible", remedy));
        }
        let needs = [
            ("synic", self.synic, "vpindex", self.vpindex),
            ("stimer", self.stimer, "synic", self.synic),
            ("stimer", self.stimer, "time", self.time),
            ("stimer_direct", self.stimer_direct, "stimer", self.stimer),
            ("tlbflush", self.tlbflush, "vpindex", self.vpindex),
            ("tlbflush_ext", self.tlbflush_ext, "tlbflush", self.tlbflush),
            ("ipi", self.ipi, "vpindex", self.vpindex),
        ];
        match needs.into_iter().find(|(_, wanted, _, there)| *wanted && !there) {
            None => Ok(()),
            Some((feature, _, needed, _)) => Err(Problem::invalid(
                &at.key(feature),
                format!("`{feature}` is not possible without `{needed}`"),
                format!("set `{feature}` to false, or `{needed}` to true"),
            )),
        }
    }
}

impl<'de> Deserialize<'de> for HypervConfig {
    // By hand, because what serde makes of an untagged enum says neither which field is wrong nor why.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = HypervConfig;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("true, false or an object of features")
            }

            fn visit_bool<E>(self, on: bool) -> Result<HypervConfig, E> {
                Ok(HypervConfig::Switch(on))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<HypervConfig, A::Error> {
                HypervFeatures::deserialize(MapAccessDeserializer::new(map)).map(HypervConfig::Features)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json;

    #[test]
    fn features_are_on_unless_they_are_turned_off_and_what_needs_another_one_says_so() {
        let read = |text: &str| json::<HypervConfig>(text.as_bytes());
        assert_eq!(read("false").unwrap().features(), None);
        assert_eq!(read("true").unwrap().features(), Some(HypervFeatures::default()));
        assert_eq!(read("{}").unwrap().features(), read("true").unwrap().features());
        let some = read(r#"{"crash":false,"vendor":"Rackvisor"}"#).unwrap().features().unwrap();
        assert_eq!(some, HypervFeatures { crash: false, vendor: "Rackvisor".into(), ..HypervFeatures::default() });
        for (text, at) in [
            (r#"{"vpindex":false}"#, "/synic"),
            (r#"{"vpindex":false,"synic":false,"stimer":false,"stimer_direct":false}"#, "/tlbflush"),
            (r#"{"time":false}"#, "/stimer"),
            (r#"{"stimer":false}"#, "/stimer_direct"),
            (r#"{"tlbflush":false,"tlbflush_ext":true}"#, "/tlbflush_ext"),
            (r#"{"vendor":""}"#, "/vendor"),
            (r#"{"vendor":"Microsoft Hv 2"}"#, "/vendor"),
        ] {
            let problem = read(text).unwrap().check(&Pointer::root()).unwrap_err();
            assert_eq!(problem.pointer.as_deref(), Some(at), "{text}");
        }
        for bad in ["1", "\"on\"", "[]", r#"{"evmcs":true}"#, r#"{"synic":1}"#] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
