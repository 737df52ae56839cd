use super::super::{Deadlines, TpmError};
use super::*;

/// A TPM that gives a command up after `command`.
fn impatient(swtpm: &Swtpm, command: Duration) -> (Tpm, Arc<RecordedNotifier>) {
    let notifier = Arc::new(RecordedNotifier::default());
    let deadlines = Deadlines { command, ..Deadlines::default() };
    let tpm = Tpm::with_deadlines(options(swtpm.socket()), &PlainThreads, notifier.clone(), deadlines);
    (tpm.unwrap(), notifier)
}

#[test]
fn when_swtpm_dies_in_a_command_it_and_all_others_fail_until_a_reset_finds_another_swtpm() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    swtpm.script().mode = Mode::Die;
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    assert!(lost(&notifier).contains("closed the connection"));
    // One that is there again must not serve a guest that goes on: its PCRs begin anew.
    swtpm.script().mode = Mode::Echo;
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    tpm.stop().unwrap();
    tpm.reset();
    notifier.wait(SOON, |event| matches!(event, DeviceEvent::BackendRestored { .. })).unwrap();
    driver.set(0x08, 1);
    assert_eq!(driver.execute(&GET_RANDOM).len(), 12);
}

#[test]
fn when_swtpm_dies_between_commands_that_is_told_at_once() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = tpm(&swtpm);
    let driver = Driver::new(&tpm);
    drop(swtpm);
    lost(&notifier);
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    // Nobody listens any more: the reset says so again, and ends.
    tpm.reset();
    let again =
        |event: &DeviceEvent| matches!(event, DeviceEvent::BackendLost { reason } if reason.contains("cannot connect"));
    notifier.wait(SOON, again).unwrap();
    driver.set(0x08, 1);
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
}

#[test]
fn a_swtpm_that_hangs_fails_the_command_at_the_deadline() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = impatient(&swtpm, Duration::from_millis(100));
    let driver = Driver::new(&tpm);
    swtpm.script().mode = Mode::Hang;
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    assert!(lost(&notifier).contains("did not answer a command"));
}

#[test]
fn a_tpm_is_taken_apart_in_the_midst_of_a_command() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = impatient(&swtpm, Duration::from_secs(100_000));
    swtpm.script().mode = Mode::Hang;
    Driver::new(&tpm).start(&GET_RANDOM);
    drop(tpm);
    assert!(notifier.events().is_empty(), "nothing was lost");
}

#[test]
fn what_is_no_response_fails_the_tpm() {
    let header = |size: u32| [&[0x80, 0x01], &size.to_be_bytes()[..], &[0; 4]].concat();
    let too_much = [header(10), vec![0]].concat();
    for answer in [header(9), header(0xf81), header(u32::MAX), too_much, vec![0xff; 5000]] {
        let swtpm = Swtpm::start();
        let (tpm, notifier) = tpm(&swtpm);
        let driver = Driver::new(&tpm);
        swtpm.script().mode = Mode::Say(answer);
        assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
        assert!(lost(&notifier).contains("no response"));
    }
}

#[test]
fn an_answer_in_pieces_that_never_ends_fails_at_the_deadline() {
    let swtpm = Swtpm::start();
    let (tpm, notifier) = impatient(&swtpm, Duration::from_millis(100));
    let driver = Driver::new(&tpm);
    swtpm.script().mode = Mode::Say(vec![0x80, 0x01, 0]);
    assert_eq!(driver.execute(&GET_RANDOM), FAILURE);
    assert!(lost(&notifier).contains("did not answer"));
}

/// Why no TPM can be made after `change`.
fn refused(change: impl FnOnce(&Swtpm)) -> TpmError {
    let swtpm = Swtpm::start();
    change(&swtpm);
    Tpm::new(options(swtpm.socket()), &PlainThreads, Arc::new(RecordedNotifier::default())).err().unwrap()
}

#[test]
fn what_swtpm_cannot_do_is_named() {
    let error = refused(|swtpm| swtpm.script().capabilities &= !(1 << 12));
    assert!(matches!(error, TpmError::Lacks("CMD_SET_DATAFD")), "{error}");
    let error = refused(|swtpm| swtpm.script().refuse = Some((0x02, 9)));
    assert!(matches!(error, TpmError::Refused { what: "CMD_INIT", code: 9 }), "{error}");
    let error = refused(|swtpm| swtpm.script().old = true);
    assert!(matches!(error, TpmError::NotTpm2), "{error}");
    let error = Tpm::new(options("/nonexistent/swtpm".as_ref()), &PlainThreads, Arc::new(RecordedNotifier::default()));
    let error = error.err().unwrap();
    assert!(matches!(error, TpmError::Connect { .. }) && error.to_string().contains("/nonexistent/swtpm"), "{error}");
    let long = "x".repeat(200);
    let error = Tpm::new(options(long.as_ref()), &PlainThreads, Arc::new(RecordedNotifier::default()));
    assert!(matches!(error.err().unwrap(), TpmError::Connect { .. }));
}

#[test]
fn a_swtpm_that_never_answers_is_given_up() {
    let swtpm = Swtpm::start();
    swtpm.script().deaf = true;
    let deadlines = Deadlines { setup: Duration::from_millis(100), ..Deadlines::default() };
    let notifier = Arc::new(RecordedNotifier::default());
    let error = Tpm::with_deadlines(options(swtpm.socket()), &PlainThreads, notifier, deadlines).err().unwrap();
    assert!(matches!(error, TpmError::Timeout { what: "CMD_GET_CAPABILITY", .. }), "{error}");
}
