//! What the compiled filters say of sockets, asked as the kernel asks them.

use super::*;

/// `SECCOMP_RET_ALLOW`.
const ALLOW: u32 = 0x7fff_0000;
/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

/// Whether a filter (classic BPF over a `struct seccomp_data`, `linux/seccomp.h`) allows a call.
fn allows(program: &BpfProgram, call: libc::c_long, arguments: [u64; 6]) -> bool {
    let mut data = Vec::new();
    data.extend(u32::try_from(call).unwrap().to_le_bytes());
    data.extend(X86_64.to_le_bytes());
    data.extend(0_u64.to_le_bytes());
    arguments.iter().for_each(|argument| data.extend(argument.to_le_bytes()));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let instruction = &program[at];
        at += 1;
        let jump = |yes: bool| usize::from(if yes { instruction.jt } else { instruction.jf });
        let k = instruction.k;
        match u32::from(instruction.code) {
            code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                let word = &data[k as usize..k as usize + 4];
                accumulator = u32::from_le_bytes(word.try_into().unwrap());
            }
            code if code == libc::BPF_ALU | libc::BPF_AND => accumulator &= k,
            code if code == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
            code if code == libc::BPF_JMP | libc::BPF_JEQ => at += jump(accumulator == k),
            code if code == libc::BPF_JMP | libc::BPF_JGT => at += jump(accumulator > k),
            code if code == libc::BPF_JMP | libc::BPF_JGE => at += jump(accumulator >= k),
            code if code == libc::BPF_RET => return k == ALLOW,
            code => panic!("instruction {code:#x}"),
        }
    }
}

/// The kinds of sockets that a thread under `policy` can make with `call`: pairs of a family and a type with its flags.
fn sockets_of(policy: Policy, call: libc::c_long) -> Vec<(libc::c_int, libc::c_int)> {
    let programs = policy::compile(&SeccompAction::Trap, TargetArch::x86_64).unwrap();
    let flags = [0, libc::SOCK_CLOEXEC, libc::SOCK_NONBLOCK, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK];
    let types = (1..=10).flat_map(|kind| flags.map(|flags| kind | flags));
    let all = (0..64).flat_map(|family| types.clone().map(move |kind| (family, kind)));
    let words = |(family, kind)| [u64::try_from(family).unwrap(), u64::try_from(kind).unwrap(), 0, 0, 0, 0];
    all.filter(|kind| allows(&programs[policy.name()], call, words(*kind))).collect()
}

#[test]
fn no_thread_makes_a_socket_of_a_network_and_only_those_for_consoles_taps_swtpm_and_helpers_make_any() {
    for policy in Policy::all() {
        let is = |kind| policy == Policy::Of(kind);
        let pairs = is(ThreadKind::Jobs) || is(ThreadKind::Tpm);
        let connects = is(ThreadKind::Tpm) || is(ThreadKind::Reservation);
        for (call, makes) in [(libc::SYS_socket, pairs || connects), (libc::SYS_socketpair, pairs)] {
            let sockets = sockets_of(policy, call);
            assert!(sockets.iter().all(|(family, _)| *family == libc::AF_UNIX), "{}: {sockets:?}", policy.name());
            assert_eq!(!sockets.is_empty(), makes, "{}", policy.name());
        }
        if connects {
            let stream = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            assert_eq!(sockets_of(policy, libc::SYS_socket), [(libc::AF_UNIX, stream)]);
        }
    }
}

#[test]
fn what_the_kernel_would_answer_is_found_out() {
    let programs = policy::compile(&SeccompAction::Trap, TargetArch::x86_64).unwrap();
    let map = |protection: libc::c_int| [0, 4096, u64::try_from(protection).unwrap(), 0, 0, 0];
    for policy in Policy::all() {
        let program = &programs[policy.name()];
        assert!(allows(program, libc::SYS_write, [1, 2, 3, 4, 5, 6]), "{}", policy.name());
        assert!(allows(program, libc::SYS_mmap, map(libc::PROT_READ | libc::PROT_WRITE)), "{}", policy.name());
        assert!(!allows(program, libc::SYS_mmap, map(libc::PROT_READ | libc::PROT_EXEC)), "{}", policy.name());
        assert!(!allows(program, libc::SYS_execve, [0; 6]), "{}", policy.name());
    }
}
