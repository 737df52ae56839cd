//! CPUID: what KVM can do on this host, or a named model has, shaped by the configuration (Intel SDM vol. 2A CPUID; AMD APM vol. 3 appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use rackvisor_api::config::{CpuModelName, CpusConfig, HypervFeatures};

use super::topology::ApicIds;
use super::{CpuError, apic_ids, hyperv, model};
use crate::kvm::chipset::Irqchip;
use crate::kvm::{KvmError, refused};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_INTEL_CACHES: u32 = 0x4;
const LEAF_POWER: u32 = 0x6;
const LEAF_EXTENDED_TOPOLOGY: u32 = 0xb;
const LEAF_V2_EXTENDED_TOPOLOGY: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
/// TSC and APIC timer frequency, where hypervisors put it.
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_SVM: u32 = 0x8000_000a;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Messages and the I/O APIC have 15 bits for the destination (KVM_FEATURE_MSI_EXT_DEST_ID).
const EAX_EXTENDED_DESTINATION: u32 = 1 << 15;
const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
const AMD_ECX_SVM: u32 = 1 << 2;
const AMD_ECX_TOPOEXT: u32 = 1 << 22;
/// KVM's APIC timer counts at 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What every vCPU of a VM has in common.
#[derive(Debug, Clone)]
pub struct CpuModel {
    entries: Vec<kvm_cpuid_entry2>,
    ids: ApicIds,
    amd: bool,
}

impl CpuModel {
    /// What `config` asks for, with a TSC of `tsc_khz`.
    ///
    /// # Errors
    /// [`CpuError`] with what this host lacks.
    pub fn of(kvm: &Kvm, config: &CpusConfig, tsc_khz: u32) -> Result<Self, CpuError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("the list of supported CPU features"))?;
        let host = Self::new(supported.as_slice().to_vec(), ApicIds::new(config.topology()), tsc_khz);
        let mut model = host.named(config.model, tsc_khz)?;
        model.nest(&host, config.nested)?;
        let bits = config.phys_bits.or(model::default_phys_bits(config.model));
        model.limit_addresses(&host, bits)?;
        let wide = Irqchip::reaching(&apic_ids(config)) == Irqchip::Split;
        if wide {
            model.extend_destinations();
        }
        if let Some(features) = config.hyperv.features() {
            let missing = hyperv::missing(kvm, &features)?;
            if !missing.is_empty() {
                return Err(CpuError::Hyperv(missing));
            }
            model.show_hyperv(&features, wide);
        }
        Ok(model)
    }

    /// This host as the model with this name.
    fn named(&self, name: CpuModelName, tsc_khz: u32) -> Result<Self, CpuError> {
        if name == CpuModelName::Host {
            return Ok(self.clone());
        }
        let missing = model::missing(&self.entries, name, self.amd);
        if !missing.is_empty() {
            return Err(CpuError::Model { name, missing });
        }
        Ok(Self::new(model::leaves(&self.entries, name, self.amd), self.ids, tsc_khz))
    }

    /// Shows or hides what a hypervisor in the guest needs.
    fn nest(&mut self, host: &Self, wanted: bool) -> Result<(), CpuError> {
        let (leaf, bit) = if self.amd { (LEAF_AMD_FEATURES, AMD_ECX_SVM) } else { (LEAF_FEATURES, ECX_VMX) };
        let there = host.entries.iter().any(|entry| entry.function == leaf && entry.ecx & bit != 0);
        if wanted && !there {
            return Err(CpuError::Nested);
        }
        for entry in self.entries.iter_mut().filter(|entry| entry.function == leaf) {
            set(&mut entry.ecx, bit, wanted);
        }
        self.entries.retain(|entry| entry.function != LEAF_AMD_SVM);
        self.entries.extend(host.entries.iter().filter(|entry| wanted && entry.function == LEAF_AMD_SVM));
        Ok(())
    }

    /// Shows this many bits of physical addresses, or the host's.
    fn limit_addresses(&mut self, host: &Self, bits: Option<u8>) -> Result<(), CpuError> {
        let Some(bits) = bits else { return Ok(()) };
        let sizes = host.entries.iter().find(|entry| entry.function == LEAF_AMD_SIZES);
        let there = sizes.map_or(0, |entry| entry.eax & 0xff);
        if u32::from(bits) > there {
            return Err(CpuError::PhysBits { wanted: bits, there });
        }
        for entry in self.entries.iter_mut().filter(|entry| entry.function == LEAF_AMD_SIZES) {
            // What a guest of the guest has is not told.
            entry.eax = entry.eax & 0xff00 | u32::from(bits);
        }
        Ok(())
    }

    /// Tells that every APIC ID can be the destination of an interrupt.
    fn extend_destinations(&mut self) {
        for entry in self.entries.iter_mut().filter(|entry| entry.function == LEAF_KVM_FEATURES) {
            entry.eax |= EAX_EXTENDED_DESTINATION;
        }
    }

    /// Hyper-V's leaves in the place of KVM's, which move or go. With `wide` they tell of extended destinations as well.
    fn show_hyperv(&mut self, features: &HypervFeatures, wide: bool) {
        self.entries.retain(|entry| {
            let kvm = matches!(entry.function, LEAF_HYPERVISOR | LEAF_KVM_FEATURES);
            entry.function != LEAF_TIMING && (features.kvm || !kvm)
        });
        for entry in &mut self.entries {
            if entry.function == LEAF_HYPERVISOR {
                entry.eax = hyperv::KVM_LEAVES + 1;
            }
            if matches!(entry.function, LEAF_HYPERVISOR | LEAF_KVM_FEATURES) {
                entry.function += hyperv::KVM_LEAVES - LEAF_HYPERVISOR;
            }
        }
        self.entries.extend(hyperv::leaves(features));
        self.entries.extend(hyperv::extended_destinations().into_iter().filter(|_| wide));
    }

    fn new(supported: Vec<kvm_cpuid_entry2>, ids: ApicIds, tsc_khz: u32) -> Self {
        let amd = supported.iter().any(|e| e.function == 0 && matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"));
        let made_here =
            [LEAF_EXTENDED_TOPOLOGY, LEAF_V2_EXTENDED_TOPOLOGY, LEAF_TIMING, LEAF_AMD_TOPOLOGY, LEAF_INTEL_CACHES];
        let mut entries: Vec<_> = supported.iter().filter(|e| !made_here.contains(&e.function)).copied().collect();
        entries.extend(supported.iter().filter(|e| e.function == LEAF_INTEL_CACHES && !amd));
        entries.push(kvm_cpuid_entry2 { function: LEAF_TIMING, eax: tsc_khz, ebx: APIC_BUS_KHZ, ..Default::default() });
        for entry in entries.iter_mut().filter(|entry| entry.function == LEAF_HYPERVISOR) {
            entry.eax = LEAF_TIMING;
        }
        Self { entries, ids, amd }
    }

    /// CPUID of the vCPU with this APIC ID, for KVM_SET_CPUID2.
    ///
    /// # Errors
    /// [`KvmError::Missing`] if KVM takes fewer entries than there are.
    pub fn for_vcpu(&self, apic_id: u32) -> Result<CpuId, KvmError> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            self.shape(entry, apic_id);
        }
        entries.extend(self.topology_leaf(LEAF_EXTENDED_TOPOLOGY, apic_id));
        if self.amd {
            entries.push(self.amd_topology(apic_id));
        }
        CpuId::from_entries(&entries).map_err(|_| KvmError::Missing("room for all CPUID entries"))
    }

    fn shape(&self, entry: &mut kvm_cpuid_entry2, apic_id: u32) {
        let (per_core, per_socket) = (self.ids.threads_per_core(), self.ids.threads_per_socket());
        match entry.function {
            LEAF_FEATURES => {
                // Initial APIC ID, IDs in a socket, CLFLUSH line size.
                let reserved_ids = 1u32 << self.ids.socket_shift();
                entry.ebx = (apic_id & 0xff) << 24 | reserved_ids.min(255) << 16 | entry.ebx & 0xffff;
                entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE;
                set(&mut entry.edx, EDX_HTT, per_socket > 1);
            }
            LEAF_INTEL_CACHES if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 < 3 { per_core } else { per_socket };
                entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14 | (per_socket / per_core - 1).min(63) << 26;
            }
            // KVM emulates neither energy bias nor turbo; always-running APIC timer stays.
            LEAF_POWER => {
                entry.eax &= 1 << 2;
                entry.ecx = 0;
            }
            LEAF_AMD_FEATURES if self.amd => {
                entry.ecx |= AMD_ECX_TOPOEXT;
                set(&mut entry.ecx, AMD_ECX_CMP_LEGACY, per_socket > 1);
            }
            LEAF_AMD_SIZES if self.amd => {
                entry.ecx = self.ids.socket_shift() << 12 | (per_socket - 1).min(255);
            }
            LEAF_AMD_CACHES => {
                let sharing = if entry.eax >> 5 & 7 < 3 { per_core } else { per_socket };
                entry.eax = entry.eax & !(0xfff << 14) | (sharing - 1) << 14;
            }
            _ => {}
        }
    }

    /// The threads and cores levels of leaf 0xB, and the empty level that ends it.
    fn topology_leaf(&self, function: u32, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift, count, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: apic_id,
            ..Default::default()
        };
        [
            level(0, self.ids.core_shift(), self.ids.threads_per_core(), 1),
            level(1, self.ids.socket_shift(), self.ids.threads_per_socket(), 2),
            level(2, 0, 0, 0),
        ]
    }

    fn amd_topology(&self, apic_id: u32) -> kvm_cpuid_entry2 {
        let core = (apic_id & ((1 << self.ids.socket_shift()) - 1)) >> self.ids.core_shift();
        kvm_cpuid_entry2 {
            function: LEAF_AMD_TOPOLOGY,
            eax: apic_id,
            ebx: (self.ids.threads_per_core() - 1) << 8 | core & 0xff,
            ecx: apic_id >> self.ids.socket_shift() & 0xff,
            ..Default::default()
        }
    }
}

/// A leaf without subleaves.
pub(super) fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use rackvisor_api::config::Topology;

    use super::*;

    fn model(vendor: &[u8; 4], cores: u16, threads: u16) -> CpuModel {
        let leaf = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let mut supported: Vec<_> = [0, 1, 4, 0xb, 0x4000_0000, 0x4000_0001, 0x8000_0001, 0x8000_0008, 0x8000_001e]
            .into_iter()
            .map(leaf)
            .collect();
        supported[0].ebx = u32::from_le_bytes(*vendor);
        supported[2].eax = 0x121;
        CpuModel::new(supported, ApicIds::new(Topology { sockets: 2, cores, threads }), 2_000_000)
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_leaf_that_tells_of_topology_tells_the_same() {
        for vendor in [b"Auth", b"Genu"] {
            let model = model(vendor, 3, 2);
            let id = ApicIds::new(Topology { sockets: 2, cores: 3, threads: 2 }).of(9);
            let cpuid = model.for_vcpu(id).unwrap();
            assert_eq!(id, 0b1011, "second socket, second core, second thread");
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, id);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 8);
            let (threads, cores) = (find(&cpuid, 0xb, 0), find(&cpuid, 0xb, 1));
            assert_eq!((threads.eax, threads.ebx, threads.edx), (1, 2, id));
            assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, id));
            assert_eq!(find(&cpuid, 0xb, 2).ecx >> 8, 0);
        }
        let amd = model(b"Auth", 3, 2).for_vcpu(0b1011).unwrap();
        let topology = find(&amd, 0x8000_001e, 0);
        assert_eq!((topology.eax, topology.ebx, topology.ecx), (0b1011, 1 << 8 | 1, 1));
        assert_eq!(find(&amd, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        let intel = model(b"Genu", 3, 2).for_vcpu(0).unwrap();
        assert_eq!(find(&intel, 4, 0).eax >> 14, 1 | 2 << 12, "two threads share the L1, three cores are in a socket");
    }

    #[test]
    fn nesting_is_hidden_unless_it_is_asked_for_and_there() {
        for (vendor, leaf, bit) in [(b"Auth", 0x8000_0001, AMD_ECX_SVM), (b"Genu", 1, ECX_VMX)] {
            let mut host = model(vendor, 1, 1);
            assert!(matches!(host.clone().nest(&host, true), Err(CpuError::Nested)));
            host.entries.iter_mut().filter(|e| e.function == leaf).for_each(|e| e.ecx |= bit);
            host.entries.push(kvm_cpuid_entry2 { function: LEAF_AMD_SVM, ..Default::default() });
            for wanted in [false, true] {
                let mut shown = host.clone();
                shown.nest(&host, wanted).unwrap();
                assert_eq!(find(&shown.for_vcpu(0).unwrap(), leaf, 0).ecx & bit != 0, wanted);
                assert_eq!(shown.entries.iter().any(|e| e.function == LEAF_AMD_SVM), wanted);
            }
        }
    }

    #[test]
    fn physical_addresses_have_at_most_the_bits_that_the_host_has() {
        let mut host = model(b"Genu", 1, 1);
        host.entries.iter_mut().filter(|e| e.function == LEAF_AMD_SIZES).for_each(|e| e.eax = 0x30_302e);
        let shown = |bits| {
            let mut shown = host.clone();
            shown.limit_addresses(&host, bits).map(|()| find(&shown.for_vcpu(0).unwrap(), LEAF_AMD_SIZES, 0).eax)
        };
        assert_eq!((shown(None).unwrap(), shown(Some(40)).unwrap()), (0x30_302e, 0x3028));
        assert!(matches!(shown(Some(47)), Err(CpuError::PhysBits { wanted: 47, there: 46 })));
    }

    #[test]
    fn a_hyper_v_takes_the_place_of_kvms_leaves_which_move_or_go() {
        let with = |features: &HypervFeatures| {
            let mut model = model(b"Genu", 1, 1);
            model.show_hyperv(features, false);
            model.for_vcpu(0).unwrap()
        };
        let both = with(&HypervFeatures::default());
        assert_eq!(find(&both, 0x4000_0000, 0).eax, 0x4000_0005);
        assert_eq!(find(&both, 0x4000_0100, 0).eax, 0x4000_0101);
        let has = |cpuid: &CpuId, function| cpuid.as_slice().iter().any(|e| e.function == function);
        assert!(!has(&both, 0x4000_0010), "Windows reads the frequencies as MSRs");
        assert!(!has(&with(&HypervFeatures { kvm: false, ..HypervFeatures::default() }), 0x4000_0100));
    }

    #[test]
    fn a_wide_topology_fits_every_leaf_and_extended_destinations_are_told_in_kvms_way_and_in_hyper_vs() {
        for vendor in [b"Auth", b"Genu"] {
            let ids = ApicIds::new(Topology { sockets: 2, cores: 300, threads: 1 });
            let id = ids.of(599);
            assert_eq!(id, 1 << 9 | 299);
            let mut model = model(vendor, 300, 1);
            assert_eq!(find(&model.for_vcpu(id).unwrap(), 0x4000_0001, 0).eax, 0);
            model.extend_destinations();
            let cpuid = model.for_vcpu(id).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ebx >> 16, (id & 0xff) << 8 | 255);
            assert_eq!((find(&cpuid, 0xb, 1).ebx, find(&cpuid, 0xb, 1).edx), (300, id));
            assert_eq!(find(&cpuid, 0x4000_0001, 0).eax, 1 << 15);
            model.show_hyperv(&HypervFeatures::default(), true);
            let cpuid = model.for_vcpu(id).unwrap();
            assert_eq!(find(&cpuid, 0x4000_0101, 0).eax, 1 << 15);
            assert_eq!(find(&cpuid, 0x4000_0081, 0).eax.to_le_bytes(), *b"VS#1");
            assert_eq!(find(&cpuid, 0x4000_0082, 0).eax, 1 << 2);
        }
        let intel = model(b"Genu", 300, 1).for_vcpu(0).unwrap();
        assert_eq!(find(&intel, 4, 0).eax >> 26, 63, "as many cores as there is room for");
    }

    #[test]
    fn the_guest_is_told_its_tsc_frequency_and_that_it_is_a_guest() {
        let cpuid = model(b"Genu", 1, 1).for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(find(&cpuid, 0x4000_0010, 0).eax, 2_000_000);
        assert_ne!(find(&cpuid, 1, 0).ecx & ECX_HYPERVISOR, 0);
    }
}
