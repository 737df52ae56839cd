//! The TPM: its table, and its device with the methods by which the guest asks firmware for changes.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Add, Arg, BufferData, DeRefOf, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    GreaterThan, If, Index, LessThan, Local, Memory32Fixed, Method, MethodCall, Name, ONE, OpRegion, OpRegionSpace,
    Package, Path, Return, Scope, Store, ToInteger, Uuid, ZERO,
};

use super::aml::{Raw, crs, raw, uid};
use crate::tpm;

/// Physical Presence Interface 1.30 §2.
const PRESENCE: &str = "3DDDFAA6-361B-4EB4-A424-8D10089D1653";
/// Platform Reset Attack Mitigation 1.10 §6.
const MEMORY_CLEAR: &str = "376054ED-CC13-4675-901C-4756D7F2D45D";

/// The body of the TPM2 table (TCG ACPI Specification 1.4 §7.3, revision 4). There is no log area: nobody measures a direct boot, and UEFI
/// hands the log over by a configuration table of its own.
pub(super) fn table() -> Vec<u8> {
    const SERVER: u16 = 1;
    /// The start method of the CRB without ACPI.
    const COMMAND_RESPONSE_BUFFER: u32 = 7;
    let mut body = Vec::new();
    body.extend(SERVER.to_le_bytes());
    body.extend([0; 2]);
    body.extend((tpm::BASE + tpm::CONTROL_AREA).to_le_bytes());
    body.extend(COMMAND_RESPONSE_BUFFER.to_le_bytes());
    // No parameters of the method, and no log.
    body.extend([0; 12 + 4 + 8]);
    body
}

/// `\_SB.TPM_`.
pub(super) fn device() -> Raw {
    let resources = crs(vec![&Memory32Fixed::new(true, tpm::BASE as u32, tpm::LENGTH as u32)]);
    raw(&Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "TPM_".into(),
            vec![
                &Name::new("_HID".into(), &"MSFT0101"),
                &uid(1),
                &Name::new("_STA".into(), &0x0fu8),
                &resources,
                &presence_memory(),
                &supported(),
                &submit(),
                &Name::new("PND1".into(), &Package::new(vec![&ZERO, &ZERO])),
                &Name::new("PND2".into(), &Package::new(vec![&ZERO, &ZERO, &ZERO])),
                &Name::new("LAST".into(), &Package::new(vec![&ZERO, &ZERO, &ZERO])),
                &specific_method(),
            ],
        )],
    ))
}

fn field(region: &str, entries: Vec<FieldEntry>) -> Raw {
    let (access, lock, update) = (FieldAccessType::Byte, FieldLockRule::NoLock, FieldUpdateRule::Preserve);
    raw(&Field::new(region.into(), access, lock, update, entries))
}

/// What is exchanged with firmware: [`tpm::Ppi`].
fn presence_memory() -> Raw {
    const START: u64 = 0x100;
    const LENGTH: u64 = 0x5b;
    let region =
        OpRegion::new("PPIR".into(), OpRegionSpace::SystemMemory, &((tpm::PPI_BASE + START) as u32), &(LENGTH as u8));
    let word = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    let fields = field(
        "PPIR",
        vec![
            // The number of an SMI and its argument: there is none.
            FieldEntry::Reserved(8 + 32),
            word(b"PPRP"),
            word(b"PPRQ"),
            word(b"PPRM"),
            word(b"LPPR"),
            FieldEntry::Reserved((0x5a - 0x15) * 8),
            FieldEntry::Named(*b"MOVV", 8),
        ],
    );
    let mut both = Vec::new();
    region.to_aml_bytes(&mut both);
    fields.to_aml_bytes(&mut both);
    Raw(both)
}

/// `PPFN(operation)`: how far firmware supports an operation; 0 not at all, 1 from its own menu, 2 blocked, 3 with the user, 4 without.
fn supported() -> Raw {
    let address = Add::new(&ZERO, &(tpm::PPI_BASE as u32), &Arg(0));
    let name = Path::new("FUNC");
    raw(&Method::new(
        "PPFN".into(),
        1,
        true,
        vec![
            &If::new(&GreaterThan::new(&Arg(0), &0xffu8), vec![&Return::new(&ZERO)]),
            &OpRegion::new("PPFR".into(), OpRegionSpace::SystemMemory, &address, &ONE),
            &field("PPFR", vec![FieldEntry::Named(*b"FUNC", 8)]),
            &Return::new(&name),
        ],
    ))
}

/// `PPRS(operation, parameter)`: leaves a request for firmware; 0 done, 1 not supported, 3 blocked.
fn submit() -> Raw {
    let support = Local(0);
    raw(&Method::new(
        "PPRS".into(),
        2,
        true,
        vec![
            &Store::new(&support, &MethodCall::new("PPFN".into(), vec![&Arg(0)])),
            &If::new(&LessThan::new(&support, &2u8), vec![&Return::new(&ONE)]),
            &If::new(&Equal::new(&support, &2u8), vec![&Return::new(&3u8)]),
            &Store::new(&Path::new("PPRQ"), &Arg(0)),
            &Store::new(&Path::new("PPRM"), &Arg(1)),
            &Return::new(&ZERO),
        ],
    ))
}

/// `_DSM(uuid, revision, function, arguments)`.
fn specific_method() -> Raw {
    let function = Local(0);
    raw(&Method::new(
        "_DSM".into(),
        4,
        true,
        vec![
            &raw(&ToInteger::new(&function, &Arg(2))),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(PRESENCE)),
                presence().iter().map(|raw| raw as &dyn Aml).collect(),
            ),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(MEMORY_CLEAR)),
                memory_clear().iter().map(|raw| raw as &dyn Aml).collect(),
            ),
            &Return::new(&BufferData::new(vec![0])),
        ],
    ))
}

/// What follows for function `number`.
fn when(number: u8, code: Vec<&dyn Aml>) -> Raw {
    raw(&If::new(&Equal::new(&Local(0), &number), code))
}

/// Argument `index` of the call, a number.
fn argument(index: u8) -> Raw {
    raw(&ToInteger::new(&ZERO, &DeRefOf::new(&Index::new(&ZERO, &Arg(3), &index))))
}

/// Puts the named number at `index` of the named package.
fn put(package: &str, index: u8, number: &str) -> Raw {
    raw(&Store::new(&Index::new(&ZERO, &Path::new(package), &index), &Path::new(number)))
}

/// Functions 0 to 8 of the physical presence interface (§2.1).
fn presence() -> Vec<Raw> {
    const REBOOT: u8 = 2;
    const NOT_IMPLEMENTED: u8 = 3;
    let (first, second) = (argument(0), argument(1));
    let request = |parameter: &dyn Aml| raw(&Return::new(&MethodCall::new("PPRS".into(), vec![&first, parameter])));
    let pending = |package: &str| raw(&Return::new(&Path::new(package)));
    let with_parameter = raw(&If::new(&Equal::new(&Arg(1), &2u8), vec![&request(&second)]));
    let revision_1 = raw(&If::new(&Equal::new(&Arg(1), &ONE), vec![&put("PND1", 1, "PPRQ"), &pending("PND1")]));
    vec![
        when(0, vec![&Return::new(&BufferData::new(vec![0xff, 0x01]))]),
        when(1, vec![&Return::new(&"1.3")]),
        when(2, vec![&request(&ZERO)]),
        when(3, vec![&revision_1, &put("PND2", 1, "PPRQ"), &put("PND2", 2, "PPRM"), &pending("PND2")]),
        when(4, vec![&Return::new(&REBOOT)]),
        when(5, vec![&put("LAST", 1, "LPPR"), &put("LAST", 2, "PPRP"), &pending("LAST")]),
        when(6, vec![&Return::new(&NOT_IMPLEMENTED)]),
        when(7, vec![&with_parameter, &request(&ZERO)]),
        when(8, vec![&Return::new(&MethodCall::new("PPFN".into(), vec![&first]))]),
    ]
}

/// Functions 0 and 1 of the memory clear interface.
fn memory_clear() -> Vec<Raw> {
    vec![
        when(0, vec![&Return::new(&BufferData::new(vec![0x03]))]),
        when(1, vec![&Store::new(&Path::new("MOVV"), &argument(0)), &Return::new(&ZERO)]),
    ]
}
