//! SMBIOS structures (DMTF DSP0134 3.6): how the machine introduces itself.

/// Bytes of the 64-bit entry point (§5.2.2).
const ENTRY_POINT_SIZE: usize = 0x18;
const VERSION: [u8; 2] = [3, 0];
/// What has no value is no text (§6.1.3).
const NO_TEXT: u8 = 0;

/// What the structures say. Texts are printable ASCII of at most 64 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SmbiosInfo {
    /// The manufacturer of the machine and its chassis.
    pub manufacturer: String,
    /// The product.
    pub product: String,
    /// Its version.
    pub version: Option<String>,
    /// Its serial number, also that of the chassis.
    pub serial: Option<String>,
    /// Its stock keeping unit.
    pub sku: Option<String>,
    /// Its family.
    pub family: Option<String>,
    /// The asset tag of the chassis.
    pub asset_tag: Option<String>,
    /// Its UUID, in the order in which it is written; none is told as none.
    pub uuid: Option<[u8; 16]>,
    /// Sockets of processors, with cores and threads of each.
    pub processors: Processors,
    /// Bytes of RAM.
    pub memory: u64,
}

/// The processors of a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Processors {
    /// Sockets.
    pub sockets: u16,
    /// Cores of each socket.
    pub cores: u16,
    /// Threads of each socket.
    pub threads: u16,
}

/// The structures and how they are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smbios {
    /// The structures, one behind the other.
    pub tables: Vec<u8>,
}

/// Structures that are being made.
#[derive(Default)]
struct Builder {
    tables: Vec<u8>,
    handle: u16,
}

/// The texts of one structure (§6.1.3).
#[derive(Default)]
struct Texts(Vec<u8>, u8);

impl Texts {
    /// The number by which the structure names `text`.
    fn number(&mut self, text: &str) -> u8 {
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
        self.1 += 1;
        self.1
    }

    fn optional(&mut self, text: Option<&String>) -> u8 {
        text.map_or(NO_TEXT, |text| self.number(text))
    }
}

impl Builder {
    /// Adds a structure with the formatted area `body`, without header; gives its handle.
    fn add(&mut self, kind: u8, body: &[u8], texts: Texts) -> u16 {
        let handle = self.handle;
        self.handle += 1;
        self.tables.extend([kind, u8::try_from(body.len() + 4).unwrap_or(u8::MAX)]);
        self.tables.extend(handle.to_le_bytes());
        self.tables.extend_from_slice(body);
        self.tables.extend_from_slice(&texts.0);
        self.tables.push(0);
        if texts.1 == 0 {
            self.tables.push(0);
        }
        handle
    }
}

impl Smbios {
    /// The structures for `info`: system, chassis, processors, memory, and the end. What describes the firmware is left to it.
    #[must_use]
    pub fn new(info: &SmbiosInfo) -> Self {
        let mut builder = Builder::default();
        system(&mut builder, info);
        chassis(&mut builder, info);
        for socket in 0..info.processors.sockets {
            processor(&mut builder, socket, &info.processors);
        }
        memory(&mut builder, info.memory);
        builder.add(32, &[0; 7], Texts::default());
        builder.add(127, &[], Texts::default());
        Self { tables: builder.tables }
    }

    /// The 64-bit entry point for structures at `address`. Firmware that places them itself takes 0.
    #[must_use]
    pub fn entry_point(&self, address: u64) -> [u8; ENTRY_POINT_SIZE] {
        let mut entry = [0; ENTRY_POINT_SIZE];
        let size = u32::try_from(self.tables.len()).unwrap_or(u32::MAX).to_le_bytes();
        let fields = [&b"_SM3_\0"[..], &[ENTRY_POINT_SIZE as u8], &VERSION, &[0, 1, 0], &size, &address.to_le_bytes()];
        for (to, from) in entry.iter_mut().zip(fields.concat()) {
            *to = from;
        }
        let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        if let Some(checksum) = entry.get_mut(5) {
            *checksum = sum.wrapping_neg();
        }
        entry
    }
}

/// §7.2.
fn system(builder: &mut Builder, info: &SmbiosInfo) {
    const POWER_SWITCH: u8 = 6;
    let mut texts = Texts::default();
    let mut body = vec![texts.number(&info.manufacturer), texts.number(&info.product)];
    body.extend([texts.optional(info.version.as_ref()), texts.optional(info.serial.as_ref())]);
    let [a, b, c, d, e, f, g, h, rest @ ..] = info.uuid.unwrap_or_default();
    // The first three fields are little-endian (§7.2.1).
    body.extend([d, c, b, a, f, e, h, g]);
    body.extend(rest);
    body.extend([POWER_SWITCH, texts.optional(info.sku.as_ref()), texts.optional(info.family.as_ref())]);
    builder.add(1, &body, texts);
}

/// §7.4.
fn chassis(builder: &mut Builder, info: &SmbiosInfo) {
    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const SECURITY_NONE: u8 = 3;
    let mut texts = Texts::default();
    let mut body = vec![texts.number(&info.manufacturer), OTHER, texts.optional(info.version.as_ref())];
    body.extend([texts.optional(info.serial.as_ref()), texts.optional(info.asset_tag.as_ref())]);
    body.extend([SAFE, SAFE, SAFE, SECURITY_NONE]);
    // OEM information, height, power cords, contained elements and their size.
    body.extend([0; 8]);
    body.push(texts.optional(info.sku.as_ref()));
    builder.add(3, &body, texts);
}

/// §7.5. What the processor is follows from CPUID.
fn processor(builder: &mut Builder, socket: u16, processors: &Processors) {
    const CENTRAL: u8 = 3;
    const FAMILY_UNKNOWN: u8 = 2;
    const POPULATED_ENABLED: u8 = 0x41;
    const UPGRADE_OTHER: u8 = 1;
    /// 64-bit capable, and multi-core.
    const CHARACTERISTICS: u16 = 1 << 2 | 1 << 3;
    const NO_CACHE: [u8; 2] = [0xff; 2];
    let mut texts = Texts::default();
    let mut body = vec![texts.number(&format!("CPU {socket}")), CENTRAL, FAMILY_UNKNOWN, NO_TEXT];
    // ID, version, voltage, clocks: unknown.
    body.extend([0; 8]);
    body.push(NO_TEXT);
    body.extend([0; 7]);
    body.extend([POPULATED_ENABLED, UPGRADE_OTHER]);
    body.extend([NO_CACHE; 3].as_flattened());
    body.extend([NO_TEXT; 3]);
    let byte = |count: u16| u8::try_from(count).unwrap_or(u8::MAX);
    body.extend([byte(processors.cores), byte(processors.cores), byte(processors.threads)]);
    body.extend(CHARACTERISTICS.to_le_bytes());
    body.extend(u16::from(FAMILY_UNKNOWN).to_le_bytes());
    for count in [processors.cores, processors.cores, processors.threads] {
        body.extend(count.to_le_bytes());
    }
    builder.add(4, &body, texts);
}

/// §7.17, §7.18, §7.20: one array with one module.
fn memory(builder: &mut Builder, bytes: u64) {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    const IN_EXTENDED_FIELD: u32 = 0x8000_0000;
    const NO_ERROR_INFORMATION: [u8; 2] = [0xfe, 0xff];
    const UNKNOWN: u8 = 2;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    let mut array = vec![SYSTEM_BOARD, SYSTEM_MEMORY, NO_CORRECTION];
    array.extend(IN_EXTENDED_FIELD.to_le_bytes());
    array.extend(NO_ERROR_INFORMATION);
    array.extend(1u16.to_le_bytes());
    array.extend(bytes.to_le_bytes());
    let array = builder.add(16, &array, Texts::default()).to_le_bytes();

    let mib = bytes >> 20;
    let (size, extended) = match u16::try_from(mib) {
        Ok(mib @ ..0x7fff) => (mib, 0),
        _ => (0x7fff, u32::try_from(mib).unwrap_or(u32::MAX)),
    };
    let mut texts = Texts::default();
    let mut module = array.to_vec();
    module.extend(NO_ERROR_INFORMATION);
    // Total and data width: unknown.
    module.extend([0xff; 4]);
    module.extend(size.to_le_bytes());
    module.extend([DIMM, 0, texts.number("DIMM 0"), NO_TEXT, RAM]);
    module.extend(u16::from(UNKNOWN).to_le_bytes());
    // Speed; manufacturer, serial number, asset tag, part number; attributes.
    module.extend([0; 7]);
    module.extend(extended.to_le_bytes());
    // Configured speed and voltages.
    module.extend([0; 8]);
    builder.add(17, &module, texts);

    // All of it, in the extended fields.
    let mut mapped = [0xff; 8].to_vec();
    mapped.extend(array);
    mapped.push(1);
    mapped.extend(0u64.to_le_bytes());
    mapped.extend(bytes.saturating_sub(1).to_le_bytes());
    builder.add(19, &mapped, Texts::default());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> SmbiosInfo {
        SmbiosInfo {
            manufacturer: "ACME".into(),
            product: "Server".into(),
            serial: Some("0815".into()),
            uuid: Some([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),
            processors: Processors { sockets: 2, cores: 300, threads: 600 },
            memory: 40 << 30,
            ..SmbiosInfo::default()
        }
    }

    /// Type, formatted area without header, and texts of each structure, as a reader finds them.
    fn structures(mut tables: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while !tables.is_empty() {
            let (kind, length) = (tables[0], usize::from(tables[1]));
            assert_eq!(usize::from(u16::from_le_bytes([tables[2], tables[3]])), found.len(), "handles are unique");
            let end = tables[length..].windows(2).position(|pair| pair == [0, 0]).unwrap() + length;
            let texts = tables[length..end].split(|byte| *byte == 0).filter(|text| !text.is_empty());
            let texts = texts.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
            found.push((kind, tables[4..length].to_vec(), texts));
            tables = &tables[end + 2..];
        }
        found
    }

    #[test]
    fn every_structure_ends_where_the_next_begins_and_the_last_is_the_end() {
        let found = structures(&Smbios::new(&info()).tables);
        let kinds: Vec<u8> = found.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [1, 3, 4, 4, 16, 17, 19, 32, 127]);
        let lengths: Vec<usize> = found.iter().map(|(_, body, _)| body.len() + 4).collect();
        // §7.2, 7.4, 7.5, 7.17, 7.18, 7.20, 7.33, 7.45.
        assert_eq!(lengths, [0x1b, 0x16, 0x30, 0x30, 0x17, 0x28, 0x1f, 0x0b, 4]);
    }

    #[test]
    fn the_system_has_the_texts_and_the_uuid_that_were_given() {
        let found = structures(&Smbios::new(&info()).tables);
        let (_, system, texts) = &found[0];
        assert_eq!(texts, &["ACME", "Server", "0815"]);
        assert_eq!(system[..4], [1, 2, 0, 3], "manufacturer, product, no version, serial number");
        assert_eq!(system[4..20], [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]);
        let unnamed = Smbios::new(&SmbiosInfo { uuid: None, ..info() });
        assert_eq!(structures(&unnamed.tables)[0].1[4..20], [0; 16]);
    }

    #[test]
    fn much_memory_and_many_cores_are_told_in_the_extended_fields() {
        let found = structures(&Smbios::new(&info()).tables);
        let (processor, module) = (&found[2].1, &found[5].1);
        assert_eq!(processor[0x1f..0x22], [0xff; 3]);
        assert_eq!(processor[0x26..0x2c], [0x2c, 1, 0x2c, 1, 0x58, 2]);
        assert_eq!(module[8..10], [0xff, 0x7f]);
        assert_eq!(module[0x18..0x1c], (40u32 << 10).to_le_bytes());
    }

    #[test]
    fn the_entry_point_sums_to_zero_and_names_size_and_address() {
        let smbios = Smbios::new(&info());
        let entry = smbios.entry_point(0xf_0020);
        assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!((&entry[..5], entry[6]), (&b"_SM3_"[..], 24));
        assert_eq!(entry[12..16], u32::try_from(smbios.tables.len()).unwrap().to_le_bytes());
        assert_eq!(entry[16..], 0xf_0020u64.to_le_bytes());
    }
}
