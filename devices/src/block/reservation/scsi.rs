//! The SCSI commands of persistent reservations (SPC-4 §6.15, §6.16), whoever carries them to the LUN.

use super::Refusal;
use super::keys::{KEYS_BYTES, Kind, Malformed, RESERVATION_BYTES, Table, parse_keys, parse_reservation};

/// After another host changed something, each path answers its next command with a unit attention, once or a few times.
pub(super) const ATTEMPTS: u32 = 12;
/// Bytes of the commands.
pub(super) const COMMAND: usize = 10;
/// Bytes of the parameter list of PERSISTENT RESERVE OUT.
pub(super) const PARAMETERS: usize = 24;

const RESERVE_IN: u8 = 0x5e;
const RESERVE_OUT: u8 = 0x5f;

/// What PERSISTENT RESERVE IN reads (SPC-4 table 211).
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub(super) enum Question {
    Keys = 0,
    Reservation = 1,
}

/// What PERSISTENT RESERVE OUT does (SPC-4 table 217).
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub(super) enum Deed {
    /// The service action key replaces the key; 0 takes it back.
    Register = 0,
    Reserve = 1,
    Release = 2,
    Clear = 3,
    PreemptAndAbort = 5,
    /// As [`Deed::Register`], whatever was registered.
    RegisterAnyway = 6,
}

/// The command that has `question` answered in at most `room` bytes.
pub(super) fn reserve_in(question: Question, room: usize) -> [u8; COMMAND] {
    let [high, low] = u16::try_from(room).unwrap_or(u16::MAX).to_be_bytes();
    [RESERVE_IN, question as u8, 0, 0, 0, 0, 0, high, low, 0]
}

/// The command that does `deed`, with our type of reservation where it matters, and its parameters.
pub(super) fn reserve_out(deed: Deed, key: u64, service_action_key: u64) -> ([u8; COMMAND], [u8; PARAMETERS]) {
    let mut parameters = [0; PARAMETERS];
    let (keys, _) = parameters.as_chunks_mut::<8>();
    for (place, key) in keys.iter_mut().zip([key, service_action_key]) {
        *place = key.to_be_bytes();
    }
    let command = [RESERVE_OUT, deed as u8, Kind::OURS_IN_SCSI, 0, 0, 0, 0, 0, PARAMETERS as u8, 0];
    (command, parameters)
}

/// Reads who is registered and who holds, by way of `ask`, which fills an answer and says how long it is.
pub(super) fn read(ask: impl Fn(Question, &mut [u8]) -> Result<usize, Refusal>) -> Result<Table, Refusal> {
    let mut answer = vec![0; KEYS_BYTES];
    let length = retried(|| ask(Question::Keys, &mut answer))?;
    let keys = parse_keys(answer.get(..length).unwrap_or_default())?;
    let mut answer = [0; RESERVATION_BYTES];
    let length = retried(|| ask(Question::Reservation, &mut answer))?;
    Ok(Table { keys, holder: parse_reservation(answer.get(..length).unwrap_or_default())? })
}

impl From<Malformed> for Refusal {
    fn from(error: Malformed) -> Self {
        Self::Refused(error.to_string())
    }
}

/// Says it again to a LUN that had to say something else first.
pub(super) fn retried<T>(mut command: impl FnMut() -> Result<T, Refusal>) -> Result<T, Refusal> {
    let mut attempts = 1;
    loop {
        match command() {
            Err(Refusal::Attention) if attempts < ATTEMPTS => attempts += 1,
            done => return done,
        }
    }
}

/// A SCSI status with its sense data (SPC-4 §4.5), of either format.
pub(super) fn status(status: u8, sense: &[u8]) -> Result<(), Refusal> {
    match status {
        0 => return Ok(()),
        0x18 => return Err(Refusal::Conflict),
        0x02 => {}
        // BUSY, TASK SET FULL, TASK ABORTED
        0x08 | 0x28 | 0x40 => return Err(Refusal::Attention),
        _ => return Err(Refusal::Refused(format!("SCSI status {status:#04x}"))),
    }
    let [format, one, two, three, ..] = *sense else {
        return Err(Refusal::Refused("CHECK CONDITION without sense data".into()));
    };
    let (key, code, qualifier) = match format & 0x7f {
        0x72 | 0x73 => (one & 0xf, two, three),
        _ => (two & 0xf, sense.get(12).copied().unwrap_or(0), sense.get(13).copied().unwrap_or(0)),
    };
    match (key, code) {
        // UNIT ATTENTION, ABORTED COMMAND
        (0x6 | 0xb, _) => Err(Refusal::Attention),
        // INVALID COMMAND OPERATION CODE, INVALID FIELD IN CDB
        (0x5, 0x20 | 0x24) => Err(Refusal::Unsupported(format!("sense {key:x}/{code:02x}/{qualifier:02x}"))),
        _ => Err(Refusal::Refused(format!("sense {key:x}/{code:02x}/{qualifier:02x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sense_data_of_either_format_tells_a_unit_attention_from_a_refusal() {
        let attention: [&[u8]; 3] =
            [&[0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x2a, 5], &[0x72, 6, 0x2a, 3], &[0xf0, 0, 0xb, 0]];
        for sense in attention {
            assert!(matches!(status(2, sense), Err(Refusal::Attention)));
        }
        let unknown = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x20, 0];
        assert!(matches!(status(2, &unknown), Err(Refusal::Unsupported(_))));
        let medium = status(2, &[0x72, 3, 0x11, 0]).unwrap_err();
        assert_eq!(medium.to_string(), "the LUN answered with sense 3/11/00");
        assert!(matches!(status(0x18, &[0; 32]), Err(Refusal::Conflict)));
        assert!(matches!(status(0x22, &[0; 32]), Err(Refusal::Refused(_))));
        assert!(matches!(status(2, &[0x72]), Err(Refusal::Refused(_))), "sense data that is none");
        assert!(status(0, &[0xff; 32]).is_ok());
    }

    #[test]
    fn what_a_lun_says_first_is_heard_and_the_command_given_again_but_not_for_ever() {
        let mut left = 3;
        let done = retried(|| {
            left -= 1;
            if left > 0 { Err(Refusal::Attention) } else { Ok(left) }
        });
        assert_eq!(done.unwrap(), 0);
        let mut asked = 0;
        let never = retried(|| -> Result<(), Refusal> {
            asked += 1;
            Err(Refusal::Attention)
        });
        assert!(matches!(never, Err(Refusal::Attention)));
        assert_eq!(asked, ATTEMPTS);
    }
}
