//! The configuration as a whole.

use super::*;

fn example(name: &str) -> String {
    format!("{}/../resources/examples/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn with_devices(disks: usize, nics: usize) -> VmConfig {
    let mut config = VmConfig::new("vm1", ByteSize::gib(1));
    config.boot = Some(BootConfig::with_kernel("vmlinux"));
    config.disks = (0..disks).map(|i| DiskConfig::new(format!("d{i}"), format!("disk{i}"))).collect();
    config.nics = (0..nics)
        .map(|i| {
            let mac = MacAddr::new([2, 0, 0, 0, 0, u8::try_from(i).unwrap()]).unwrap();
            NicConfig::new(format!("n{i}"), format!("tap{i}"), mac)
        })
        .collect();
    config
}

fn slots(config: &VmConfig) -> Vec<u8> {
    slot_assignment(config).unwrap().into_iter().map(|(_, slot)| slot).collect()
}

#[test]
fn a_configuration_with_the_least_has_the_documented_defaults() {
    let document = br#"{"name":"a","memory":{"size":"128MiB"},"boot":{"kernel":"k"},
        "disks":[{"id":"d","path":"p"}],"nics":[{"id":"n","tap":"t","mac":"02:00:00:00:00:01"}]}"#;
    let config = VmConfig::from_json(document).unwrap();
    let mut expected = VmConfig::new("a", ByteSize::mib(128));
    expected.boot = Some(BootConfig::with_kernel("k"));
    expected.disks = vec![DiskConfig::new("d", "p")];
    expected.nics = vec![NicConfig::new("n", "t", "02:00:00:00:00:01".parse().unwrap())];
    assert_eq!(config, expected);
    assert_eq!((config.cpus.count, config.rng, config.on_reboot), (1, true, OnReboot::Restart));
    assert_eq!((config.memory.hugepages, config.serial.mode), (HugePages::Thp, SerialMode::Off));
    assert_eq!((config.disks[0].queue_size, config.nics[0].queue_size), (256, 256));
    assert_eq!(config.cpus.topology(), Topology { sockets: 1, cores: 1, threads: 1 });
}

#[test]
fn what_is_written_reads_back_the_same() {
    let config = VmConfig::from_file(example("full.toml")).unwrap();
    assert_eq!(VmConfig::from_json(&serde_json::to_vec(&config).unwrap()).unwrap(), config);
    assert_eq!(VmConfig::from_toml(&toml::to_string(&config).unwrap()).unwrap(), config);
}

#[test]
fn the_json_and_the_toml_example_are_the_same_vm() {
    let json = VmConfig::from_file(example("linux.json")).unwrap();
    assert_eq!(VmConfig::from_file(example("linux.toml")).unwrap(), json);
    assert_eq!(json.disks[0].queues, 2);
}

#[test]
fn mistakes_in_a_file_name_the_file_and_the_field() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    for (text, code, pointer) in [
        ("name = ", Code::MalformedBody, None),
        ("name = 'a'\nmemory = { size = '1GiB' }\n[cpus]\ncuont = 1", Code::InvalidContent, Some("/cpus/cuont")),
        ("name = 'a'\nmemory = [ '1GiB' ]\nboot = { kernel = 'k' }", Code::InvalidContent, Some("/memory")),
        (
            "name = 'a'\nmemory = { size = '1GiB' }\ncpus = []\nboot = { kernel = 'k' }",
            Code::InvalidContent,
            Some("/cpus"),
        ),
        ("name = 'a'\nmemory = { size = 7 }\nboot = { kernel = 'k' }", Code::InvalidValue, Some("/memory/size")),
    ] {
        std::fs::write(&file, text).unwrap();
        let problem = VmConfig::from_file(&file).unwrap_err();
        assert_eq!((problem.code, problem.pointer.as_deref()), (code, pointer), "{text}: {problem}");
        assert!(problem.detail.contains("vm.toml"), "{problem}");
    }
    assert_eq!(VmConfig::from_file(folder.path().join("none")).unwrap_err().code, Code::Unusable);
    std::fs::write(&file, vec![b' '; 2 << 20]).unwrap();
    assert_eq!(VmConfig::from_file(&file).unwrap_err().code, Code::Unusable);
}

#[test]
fn an_array_is_no_object() {
    for document in ["[]", "[\"a\"]", r#"{"name":"a","memory":["1GiB"],"boot":{"kernel":"k"}}"#] {
        assert_eq!(VmConfig::from_json(document.as_bytes()).unwrap_err().code, Code::InvalidContent, "{document}");
    }
}

#[test]
fn devices_get_slots_in_configuration_order_around_those_that_are_fixed() {
    let mut config = with_devices(3, 1);
    assert_eq!(slots(&config), [1, 2, 3, 4, 5]);
    config.disks[1].slot = Some(1);
    config.nics[0].slot = Some(30);
    assert_eq!(slots(&config), [2, 1, 3, 30, 4]);
    config.rng = false;
    assert_eq!(slot_assignment(&config).unwrap().len(), 4);
}

#[test]
fn thirty_devices_fit_and_the_next_is_told_so() {
    assert_eq!(slots(&with_devices(20, 9)), (1..=30).collect::<Vec<u8>>());
    let problem = with_devices(20, 10).validate().unwrap_err();
    assert_eq!((problem.code, problem.pointer.as_deref()), (Code::NoFreeSlot, Some("/rng")));
    let mut config = with_devices(2, 0);
    for slot in [0, 31, 32, 255] {
        config.disks[0].slot = Some(slot);
        assert_eq!(slot_assignment(&config).unwrap_err().code, Code::InvalidValue, "{slot}");
    }
    config.disks[0].slot = Some(9);
    config.disks[1].slot = Some(9);
    assert_eq!(slot_assignment(&config).unwrap_err().code, Code::Duplicate);
}

#[test]
fn a_disk_image_is_shared_only_by_readers() {
    let mut config = with_devices(2, 0);
    config.disks[1].path = config.disks[0].path.clone();
    assert_eq!(config.validate().unwrap_err().code, Code::Duplicate);
    config.disks[0].read_only = true;
    assert_eq!(config.validate().unwrap_err().code, Code::Duplicate);
    config.disks[1].read_only = true;
    config.validate().unwrap();
}

#[test]
fn a_lun_is_named_in_printable_ascii_and_reserved_only_to_be_written() {
    let refused = |disk: DiskConfig| disk.check(&Pointer::root()).unwrap_err().pointer;
    let with_wwid = |wwid: &str| DiskConfig { wwid: Some(wwid.into()), ..DiskConfig::new("d", "p") };
    for wwid in ["", "naa.\u{e4}", "a\n", &"6".repeat(256)] {
        assert_eq!(refused(with_wwid(wwid)).as_deref(), Some("/wwid"), "{wwid:?}");
    }
    with_wwid("naa.6001405a1b2c3d4e").check(&Pointer::root()).unwrap();
    let document = br#"{"id":"d","path":"p","reservation":{"key":"0x1A2B"}}"#;
    let disk: DiskConfig = json(document).unwrap();
    let reservation = disk.reservation.clone().unwrap();
    assert_eq!((reservation.key.0.get(), reservation.preempt, &reservation.helper), (0x1a2b, false, &None));
    disk.check(&Pointer::root()).unwrap();
    assert_eq!(refused(DiskConfig { read_only: true, ..disk.clone() }).as_deref(), Some("/reservation"));
    let patch: DiskPatch = json(br#"{"reservation":{"key":"0x1a2b","preempt":true},"wwid":"naa.5"}"#).unwrap();
    let patched = patch.apply(&disk).unwrap();
    assert!(patched.reservation.as_ref().unwrap().preempt && patched.wwid.as_deref() == Some("naa.5"));
    let socket = |length| Some(ReservationConfig { helper: Some("s".repeat(length).into()), ..reservation.clone() });
    DiskConfig { reservation: socket(107), ..disk.clone() }.check(&Pointer::root()).unwrap();
    for length in [0, 108] {
        let reservation = socket(length);
        assert_eq!(refused(DiskConfig { reservation, ..disk.clone() }).as_deref(), Some("/reservation/helper"));
    }
    let unset: DiskPatch = json(br#"{"reservation":null,"wwid":null}"#).unwrap();
    assert_eq!(unset.apply(&patched).unwrap(), DiskConfig::new("d", "p"));
    for bad in [r#"{"key":"1a2b"}"#, r#"{"key":6699}"#, r#"{"preempt":true}"#, r#"{"key":"0x1","type":5}"#, "true"] {
        let document = format!(r#"{{"id":"d","path":"p","reservation":{bad}}}"#);
        assert!(json::<DiskConfig>(document.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn rss_needs_several_queues_also_after_a_change() {
    let mut nic = with_devices(0, 1).nics.remove(0);
    let refused = |nic: &NicConfig| nic.check(&Pointer::root()).unwrap_err();
    (nic.queues, nic.rss) = (2, true);
    nic.check(&Pointer::root()).unwrap();
    let patch: NicPatch = json(br#"{"queues":null}"#).unwrap();
    let problem = refused(&patch.apply(&nic).unwrap());
    assert_eq!((problem.code, problem.pointer.as_deref()), (Code::InvalidValue, Some("/rss")));
    let patch: NicPatch = json(br#"{"queues":null,"rss":null}"#).unwrap();
    let patched = patch.apply(&nic).unwrap();
    assert!(!patched.rss && !patch.is_live());
    patched.check(&Pointer::root()).unwrap();
}

#[test]
fn a_nic_has_a_tap_by_name_or_as_many_descriptors_as_pairs_of_queues() {
    let passed = |count| Some(TapFds::Passed(count));
    let inherited = |numbers: &[u32]| Some(TapFds::Inherited(numbers.to_vec()));
    for (tap, tap_fds, queues, at) in [
        (Some("tap0"), None, 2, None),
        (None, passed(2), 2, None),
        (None, inherited(&[3, 1023]), 2, None),
        (None, None, 1, Some("/nics/0/tap")),
        (Some("tap0"), passed(1), 1, Some("/nics/0/tap_fds")),
        (None, passed(1), 2, Some("/nics/0/tap_fds")),
        (None, passed(0), 1, Some("/nics/0/tap_fds")),
        (None, inherited(&[]), 1, Some("/nics/0/tap_fds")),
        (None, inherited(&[3, 4]), 1, Some("/nics/0/tap_fds")),
        (None, inherited(&[3, 2]), 2, Some("/nics/0/tap_fds/inherited/1")),
        (None, inherited(&[0]), 1, Some("/nics/0/tap_fds/inherited/0")),
        (None, inherited(&[1024]), 1, Some("/nics/0/tap_fds/inherited/0")),
        (None, inherited(&[7, 7]), 2, Some("/nics/0/tap_fds/inherited/1")),
        (None, inherited(&[9]), 1, Some("/nics/1/tap_fds/inherited/0")),
    ] {
        let mut config = with_devices(0, 2);
        config.nics[0] = NicConfig { tap: tap.map(str::to_owned), tap_fds, queues, ..config.nics[0].clone() };
        config.nics[1] = NicConfig { tap: None, tap_fds: inherited(&[9]), ..config.nics[1].clone() };
        let pointer = config.validate().err().map(|problem| problem.pointer.unwrap());
        assert_eq!(pointer.as_deref(), at, "{:?}", config.nics[0]);
    }
    let document = br#"{"id":"n","tap_fds":{"passed":1},"mac":"02:00:00:00:00:01"}"#;
    assert_eq!(json::<NicConfig>(document).unwrap().tap_fds, passed(1));
    for bad in [r#"{"passed":1,"inherited":[3]}"#, r#"{"passed":-1}"#, r#"{"opened":1}"#, "{}", "3", r#"["passed"]"#] {
        let document = format!(r#"{{"id":"n","tap_fds":{bad},"mac":"02:00:00:00:00:01"}}"#);
        assert_eq!(json::<NicConfig>(document.as_bytes()).unwrap_err().code, Code::InvalidContent, "{bad}");
    }
}

#[test]
fn memory_is_bounded_and_aligned_to_its_pages() {
    let mut config = with_devices(0, 0);
    for (size, pages, fits) in [
        (ByteSize::mib(128), HugePages::Off, true),
        (ByteSize::mib(126), HugePages::Off, false),
        (ByteSize::mib(129), HugePages::Off, false),
        (ByteSize(ByteSize::mib(128).bytes() + 1), HugePages::Thp, false),
        (ByteSize::mib(1536), HugePages::Size2M, true),
        (ByteSize::mib(1536), HugePages::Size1G, false),
        (MAX_MEMORY, HugePages::Size1G, true),
        (ByteSize(u64::MAX), HugePages::Off, false),
    ] {
        (config.memory.size, config.memory.hugepages) = (size, pages);
        assert_eq!(config.validate().is_ok(), fits, "{size} of {pages:?}");
    }
}

#[test]
fn a_merge_patch_keeps_sets_and_clears() {
    let disk = DiskConfig { queues: 4, serial: Some("S".into()), slot: Some(3), ..DiskConfig::new("d", "p") };
    let patch: DiskPatch = json(br#"{"queues":null,"serial":null,"direct":false,"path":"q"}"#).unwrap();
    let expected = DiskConfig { slot: Some(3), direct: Some(false), ..DiskConfig::new("d", "q") };
    assert_eq!(patch.apply(&disk).unwrap(), expected);
    let text = serde_json::to_string(&patch).unwrap();
    assert_eq!(json::<DiskPatch>(text.as_bytes()).unwrap(), patch);

    let empty: DiskPatch = json(b"{}").unwrap();
    assert!(empty.is_live() && !patch.is_live());
    let live: DiskPatch = json(br#"{"limits":{"ops_per_second":5},"on_error":"stop","stall_after":"2s"}"#).unwrap();
    assert!(live.is_live());
    assert_eq!(live.apply(&disk).unwrap().limits.ops_per_second, Some(5));
    assert_eq!(empty.apply(&disk).unwrap(), disk);
    assert!(json::<DiskPatch>(br#"{"id":"x"}"#).is_err());
    let null: DiskPatch = json(br#"{"path":null}"#).unwrap();
    assert_eq!(null.apply(&disk).unwrap_err().pointer.as_deref(), Some("/path"));

    let nic = with_devices(0, 1).nics.remove(0);
    let to_fds: NicPatch = json(br#"{"tap":null,"tap_fds":{"inherited":[7]}}"#).unwrap();
    let changed = to_fds.apply(&nic).unwrap();
    changed.check(&Pointer::root()).unwrap();
    assert_eq!((&changed.tap, &changed.tap_fds), (&None, &Some(TapFds::Inherited(vec![7]))));
    let back: NicPatch = json(br#"{"tap":"tap0","tap_fds":null}"#).unwrap();
    assert_eq!(back.apply(&changed).unwrap(), nic);
    let neither: NicPatch = json(br#"{"tap":null}"#).unwrap();
    let problem = neither.apply(&nic).unwrap().check(&Pointer::root()).unwrap_err();
    assert_eq!(problem.pointer.as_deref(), Some("/tap"));
    assert!(!to_fds.is_live());

    assert!(NicPatch::link(Link::Down).is_live());
    let more: NicPatch = json(br#"{"link":"up","mtu":null}"#).unwrap();
    assert!(!more.is_live());
    let live: NicPatch = json(br#"{"link":"up","rx_limits":{"packets_per_second":9},"tx_limits":null}"#).unwrap();
    assert!(live.is_live());
}

#[test]
fn what_needs_a_look_at_each_frame_is_refused_where_the_kernel_moves_them() {
    let mut config = with_devices(0, 1);
    config.nics[0].vhost = true;
    config.validate().unwrap();
    for (patch, field) in [
        (&br#"{"antispoof":true}"#[..], "antispoof"),
        (br#"{"rx_limits":{"packets_per_second":9}}"#, "rx_limits"),
        (br#"{"tx_limits":{"bytes_burst":"1MiB","bytes_per_second":"1MiB"}}"#, "tx_limits"),
    ] {
        let mut nic = json::<NicPatch>(patch).unwrap().apply(&config.nics[0]).unwrap();
        let problem = config.with_nic(nic.clone()).unwrap_err();
        assert_eq!(problem.code, Code::InvalidValue, "{problem:?}");
        assert_eq!(problem.pointer, Some(format!("/{field}")));
        assert!(problem.remedy.contains("`vhost` to false"), "{}", problem.remedy);
        nic.vhost = false;
        config.with_nic(nic).unwrap();
    }
    assert!(!json::<NicPatch>(br#"{"vhost":null}"#).unwrap().is_live());
}

#[test]
fn a_disk_names_a_group_that_exists_and_groups_are_named_once() {
    let mut config = with_devices(1, 0);
    config.disks[0].group = Some("g".into());
    let problem = config.validate().unwrap_err();
    assert_eq!(problem.pointer.as_deref(), Some("/disks/0/group"));
    config.disk_groups = vec![DiskGroup { id: "g".into(), limits: Limits::default() }];
    config.validate().unwrap();
    config.disk_groups.push(config.disk_groups[0].clone());
    assert_eq!(config.validate().unwrap_err().code, Code::Duplicate);
    let group =
        |id: &str, ops| DiskGroup { id: id.into(), limits: Limits { ops_per_second: Some(ops), ..Limits::default() } };
    config.disk_groups.pop();
    assert_eq!(config.with_disk_group(group("g", 5)).unwrap().disk_groups, [group("g", 5)]);
    assert_eq!(config.with_disk_group(group("h", 5)).unwrap_err().code, Code::NoSuchDiskGroup);
    let problem = config.with_disk_group(group("g", 0)).unwrap_err();
    assert_eq!(problem.pointer.as_deref(), Some("/limits/ops_per_second"));
}

#[test]
fn affinity_is_for_all_queues_or_for_each_and_a_stall_takes_a_second_at_least() {
    let mut config = with_devices(1, 0);
    config.disks[0].queues = 3;
    let list = |text: &str| text.parse::<CpuList>().unwrap();
    for (affinity, fits) in [(vec![], true), (vec!["0"], true), (vec!["0", "1"], false), (vec!["0", "1", "2"], true)] {
        config.disks[0].affinity = affinity.into_iter().map(list).collect();
        assert_eq!(config.validate().is_ok(), fits, "{:?}", config.disks[0].affinity);
    }
    for (text, fits) in [("999ms", false), ("1s", true), ("24h", true), ("24h 1ms", false)] {
        config.disks[0].stall_after = text.parse().unwrap();
        assert_eq!(config.validate().is_ok(), fits, "{text}");
    }
}

#[test]
fn a_guest_starts_from_a_kernel_or_from_firmware_and_says_only_what_belongs_to_it() {
    let at = |boot: &str| {
        let document = format!(r#"{{"name":"a","memory":{{"size":"128MiB"}},"boot":{boot}}}"#);
        VmConfig::from_json(document.as_bytes()).map_err(|problem| (problem.code, problem.pointer.unwrap()))
    };
    let refused = |boot: &str| at(boot).unwrap_err();
    let invalid = |pointer: &str| (Code::InvalidValue, pointer.to_owned());
    at(r#"{"firmware":{"code":"c","vars":"v"}}"#).unwrap();
    at(r#"{"firmware":{"code":"c","vars":"v","smm":true}}"#).unwrap();
    assert_eq!(refused("{}"), (Code::BootSourceMissing, "/boot".into()));
    assert_eq!(refused(r#"{"kernel":"k","firmware":{"code":"c","vars":"v"}}"#), invalid("/boot/firmware"));
    assert_eq!(refused(r#"{"firmware":{"code":"c","vars":"c"}}"#), invalid("/boot/firmware/vars"));
    assert_eq!(refused(r#"{"firmware":{"code":"","vars":"c"}}"#), invalid("/boot/firmware/code"));
    assert_eq!(refused(r#"{"firmware":{"code":"c","vars":"v"},"cmdline":"x"}"#), invalid("/boot/cmdline"));
    assert_eq!(refused(r#"{"firmware":{"code":"c","vars":"v"},"initrd":"x"}"#), invalid("/boot/initrd"));
}

#[test]
fn the_boot_order_is_for_firmware_and_each_place_in_it_is_given_once() {
    let mut config = VmConfig::from_file(example("uefi.toml")).unwrap();
    assert_eq!(boot_order(&config), ["root", "net0"]);
    config.nics[0].boot_index = Some(0);
    assert_eq!(boot_order(&config), ["net0", "root"]);
    config.nics[0].boot_index = Some(1);
    let problem = config.validate().unwrap_err();
    assert_eq!((problem.code, problem.pointer.as_deref()), (Code::Duplicate, Some("/nics/0/boot_index")));
    config.nics[0].boot_index = None;
    config.boot = Some(BootConfig::with_kernel("k"));
    let problem = config.validate().unwrap_err();
    assert_eq!((problem.code, problem.pointer.as_deref()), (Code::InvalidValue, Some("/disks/0/boot_index")));
}
