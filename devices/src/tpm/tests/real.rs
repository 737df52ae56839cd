use std::process::{Child, Command, Stdio};

use vmm_sys_util::tempdir::TempDir;

use super::*;

/// The real swtpm. Dropping it kills it.
struct Real {
    process: Child,
    folder: TempDir,
}

impl Real {
    /// Starts it with its state in a folder, unless it is not installed.
    fn start() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        match Self::run(&folder) {
            Some(process) => Some(Self { process, folder }),
            None => {
                eprintln!("SKIPPED: swtpm is not installed (Debian package swtpm)");
                None
            }
        }
    }

    fn run(folder: &TempDir) -> Option<Child> {
        let state = format!("dir={}", folder.as_path().display());
        let socket = folder.as_path().join("ctrl");
        let _ = std::fs::remove_file(&socket);
        let control = format!("type=unixio,path={}", socket.display());
        let mut command = Command::new("swtpm");
        command.args(["socket", "--tpm2", "--tpmstate", &state, "--ctrl", &control]);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
        let end = Instant::now() + SOON;
        while !listens(&socket) {
            assert!(Instant::now() < end, "swtpm does not listen");
            std::thread::yield_now();
        }
        Some(process)
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.process = Self::run(&self.folder).unwrap();
    }

    fn tpm(&self) -> (Tpm, Arc<RecordedNotifier>) {
        let notifier = Arc::new(RecordedNotifier::default());
        let socket = self.folder.as_path().join("ctrl");
        (Tpm::new(options(&socket), &PlainThreads, notifier.clone()).unwrap(), notifier)
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Whether somebody listens at the socket, which exists a moment before: the kernel shows it as accepting.
fn listens(socket: &std::path::Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    sockets.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some("00010000"))
}

/// TPM2_Startup(CLEAR).
const STARTUP: [u8; 12] = [0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x44, 0, 0];
const SUCCESS: [u8; 10] = [0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0];

/// TPM2_PCR_Read of the SHA-256 of PCR 16; gives the digest.
fn read_pcr(driver: &Driver) -> Vec<u8> {
    let response = driver.execute(&[0x80, 0x01, 0, 0, 0, 20, 0, 0, 0x01, 0x7e, 0, 0, 0, 1, 0, 0x0b, 3, 0, 0, 1]);
    assert_eq!(response[6..10], [0; 4]);
    response[response.len() - 32..].to_vec()
}

/// TPM2_PCR_Extend of PCR 16 with a SHA-256.
fn extend_pcr(driver: &Driver, digest: u8) {
    let head = [0x80, 0x02, 0, 0, 0, 65, 0, 0, 0x01, 0x82, 0, 0, 0, 16];
    let authorisation = [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0];
    let command = [&head[..], &authorisation, &[0, 0, 0, 1, 0, 0x0b], &[digest; 32]].concat();
    assert_eq!(command.len(), 65);
    assert_eq!(driver.execute(&command)[6..10], [0; 4]);
}

#[test]
fn the_real_swtpm_extends_pcrs_and_a_reset_clears_them() {
    let Some(swtpm) = Real::start() else { return };
    let (tpm, notifier) = swtpm.tpm();
    let driver = Driver::new(&tpm);
    assert_eq!(driver.execute(&GET_RANDOM)[6..10], [0, 0, 0x01, 0x00], "TPM_RC_INITIALIZE before TPM2_Startup");
    assert_eq!(driver.execute(&STARTUP), SUCCESS);
    let (first, second) = (driver.execute(&GET_RANDOM), driver.execute(&GET_RANDOM));
    assert_eq!((first.len(), second.len()), (20, 20));
    assert_ne!(first, second);
    assert_eq!(read_pcr(&driver), [0; 32]);
    extend_pcr(&driver, 7);
    let extended = read_pcr(&driver);
    assert_ne!(extended, [0; 32]);
    tpm.stop().unwrap();
    tpm.reset();
    driver.set(0x08, 1);
    assert_eq!(driver.execute(&STARTUP), SUCCESS);
    assert_eq!(read_pcr(&driver), [0; 32]);
    extend_pcr(&driver, 7);
    assert_eq!(read_pcr(&driver), extended);
    assert!(notifier.events().is_empty(), "{:?}", notifier.events());
}

#[test]
fn the_real_swtpm_serves_one_tpm_after_the_other() {
    let Some(swtpm) = Real::start() else { return };
    for _ in 0..3 {
        let (tpm, _) = swtpm.tpm();
        assert_eq!(Driver::new(&tpm).execute(&STARTUP), SUCCESS);
    }
}

#[test]
fn the_real_swtpm_that_is_killed_fails_commands_until_it_is_there_again_and_the_vm_is_reset() {
    let Some(mut swtpm) = Real::start() else { return };
    let (tpm, notifier) = swtpm.tpm();
    let driver = Driver::new(&tpm);
    assert_eq!(driver.execute(&STARTUP), SUCCESS);
    swtpm.kill();
    lost(&notifier);
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    swtpm.start_again();
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    tpm.reset();
    driver.set(0x08, 1);
    assert_eq!(driver.execute(&STARTUP), SUCCESS);
}
