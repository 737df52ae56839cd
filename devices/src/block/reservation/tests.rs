//! Hosts that fight for a LUN. The LUN is a double that keeps the rules of SPC-4 §5.13 as far as they matter here.

use std::sync::{Mutex, MutexGuard};

use super::keys::Holder;
use super::*;

/// A LUN that several hosts reach.
#[derive(Clone, Default)]
pub struct Lun(Arc<Mutex<State>>);

type Hook = Box<dyn FnMut(&str, &mut Inside) + Send>;

#[derive(Default)]
struct State {
    inside: Inside,
    /// How often it was asked for its keys.
    looks: usize,
    /// Called before each command.
    hook: Option<Hook>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Inside {
    /// Path (host and number) and key.
    registered: Vec<((u8, u8), u64)>,
    /// The path that holds, and how.
    holder: Option<((u8, u8), Kind)>,
    dead: bool,
}

impl Inside {
    fn key_of(&self, path: (u8, u8)) -> Option<u64> {
        self.registered.iter().find(|(of, _)| *of == path).map(|(_, key)| *key)
    }

    fn forget(&mut self, gone: impl Fn((u8, u8), u64) -> bool) {
        self.registered.retain(|(path, key)| !gone(*path, *key));
        let holder = self.holder.filter(|(path, _)| self.key_of(*path).is_some());
        self.holder = holder;
    }
}

impl Lun {
    fn inside(&self) -> Inside {
        self.lock().inside.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut Inside)) {
        change(&mut self.lock().inside);
    }

    /// Pulls all cables of it, or plugs them in again.
    fn kill(&self, dead: bool) {
        self.change(|inside| inside.dead = dead);
    }

    fn before_each(&self, hook: impl FnMut(&str, &mut Inside) + Send + 'static) {
        self.lock().hook = Some(Box::new(hook));
    }

    /// How often it was asked for its keys.
    pub fn looks(&self) -> usize {
        self.lock().looks
    }

    /// What is registered.
    pub fn keys(&self) -> Vec<u64> {
        self.inside().registered.iter().map(|(_, key)| *key).collect()
    }

    /// The LUN as host `host` sees it, over two paths.
    fn seen_by(&self, host: u8) -> Box<dyn Target> {
        Box::new(Host { lun: self.clone(), paths: vec![(host, 0), (host, 1)], gone: [false, false] })
    }

    /// The LUN as host `host` sees it over its path `number` alone.
    pub(super) fn over_path(&self, host: u8, number: u8) -> impl Target + use<> {
        Host { lun: self.clone(), paths: vec![(host, number)], gone: [false, false] }
    }

    /// As [`Self::seen_by`], for tests of others.
    pub fn reserved_by(&self, host: u8, key: u64, preempt: bool) -> Result<Reservation, ReservationError> {
        Reservation::acquire_on(self.seen_by(host), Path::new("/dev/lun"), &options(key, preempt))
    }
}

struct Host {
    lun: Lun,
    paths: Vec<(u8, u8)>,
    /// Paths that do not work.
    gone: [bool; 2],
}

impl Host {
    fn command<T>(&self, name: &str, act: impl FnOnce(&mut Inside) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let mut state = self.lun.lock();
        state.looks += usize::from(name == "read");
        let State { inside, hook, .. } = &mut *state;
        if let Some(hook) = hook {
            hook(name, inside);
        }
        if inside.dead { Err(Refusal::Unreachable("no path".into())) } else { act(inside) }
    }

    /// The path that the kernel chooses.
    fn path(&self) -> (u8, u8) {
        self.paths[usize::from(self.gone[0])]
    }
}

impl Target for Host {
    fn read(&self) -> Result<Table, Refusal> {
        self.command("read", |inside| {
            let holder = inside.holder.map(|(path, kind)| {
                let key = if kind.is_held_by_all() { 0 } else { inside.key_of(path).unwrap() };
                Holder { key, kind }
            });
            Ok(Table { keys: inside.registered.iter().map(|(_, key)| *key).collect(), holder })
        })
    }

    fn register(&self, key: u64) -> Result<(), Refusal> {
        self.command("register", |inside| {
            if self.gone.contains(&true) {
                return Err(Refusal::Unreachable("a path failed".into()));
            }
            inside.registered.retain(|(path, _)| !self.paths.contains(path));
            inside.registered.extend(self.paths.iter().map(|path| (*path, key)));
            Ok(())
        })
    }

    fn unregister(&self, key: u64) -> Result<(), Refusal> {
        self.command("unregister", |inside| {
            // As the kernel does: one path after the other, up to the first that refuses.
            for (path, gone) in self.paths.iter().zip(self.gone) {
                if gone {
                    return Err(Refusal::Unreachable("a path failed".into()));
                }
                if inside.key_of(*path) != Some(key) {
                    return Err(Refusal::Conflict);
                }
                inside.forget(|of, _| of == *path);
            }
            Ok(())
        })
    }

    fn reserve(&self, key: u64) -> Result<(), Refusal> {
        self.command("reserve", |inside| {
            if inside.key_of(self.path()) != Some(key) {
                return Err(Refusal::Conflict);
            }
            match inside.holder {
                None => inside.holder = Some((self.path(), Kind::OURS)),
                Some((path, Kind::OURS)) if self.paths.contains(&path) => {}
                Some(_) => return Err(Refusal::Conflict),
            }
            Ok(())
        })
    }

    fn release(&self, key: u64) -> Result<(), Refusal> {
        self.command("release", |inside| {
            if inside.key_of(self.path()) != Some(key) {
                return Err(Refusal::Conflict);
            }
            if inside.holder.is_some_and(|(path, kind)| self.paths.contains(&path) && kind == Kind::OURS) {
                inside.holder = None;
            }
            Ok(())
        })
    }

    fn preempt(&self, key: u64, victim: u64) -> Result<(), Refusal> {
        self.command("preempt", |inside| {
            let own = self.path();
            if inside.key_of(own) != Some(key) {
                return Err(Refusal::Conflict);
            }
            let all = inside.holder.is_some_and(|(_, kind)| kind.is_held_by_all());
            if all && victim == 0 {
                inside.forget(|path, _| path != own);
                inside.holder = Some((own, Kind::OURS));
                return Ok(());
            }
            if !inside.registered.iter().any(|(_, key)| *key == victim) {
                return Err(Refusal::Conflict);
            }
            let held = inside.holder.is_some_and(|(path, _)| inside.key_of(path) == Some(victim));
            inside.forget(|path, key| key == victim && path != own);
            if held {
                inside.holder = Some((own, Kind::OURS));
            }
            Ok(())
        })
    }

    fn clear(&self, key: u64) -> Result<(), Refusal> {
        self.command("clear", |inside| {
            if inside.key_of(self.path()) != Some(key) {
                return Err(Refusal::Conflict);
            }
            *inside = Inside::default();
            Ok(())
        })
    }
}

const A: u64 = 0xa;
const B: u64 = 0xb;

fn options(key: u64, preempt: bool) -> ReservationOptions {
    ReservationOptions { key: NonZeroU64::new(key).unwrap(), preempt, helper: None }
}

fn error(outcome: Result<Reservation, ReservationError>) -> String {
    outcome.expect_err("it is refused").to_string()
}

#[test]
fn a_lun_is_reserved_over_all_paths_and_free_again_afterwards() {
    let lun = Lun::default();
    let reservation = lun.reserved_by(1, A, false).unwrap();
    assert_eq!(lun.keys(), [A, A]);
    assert_eq!(lun.inside().holder, Some(((1, 0), Kind::OURS)));
    assert_eq!(reservation.check().unwrap(), Standing::Held);
    reservation.release().unwrap();
    assert_eq!(lun.inside(), Inside::default());
    assert_eq!(reservation.check().unwrap(), Standing::Held, "what was given up is not lost");
    drop(reservation);
    drop(lun.reserved_by(1, A, false).unwrap());
    assert_eq!(lun.inside(), Inside::default(), "dropping it releases it");
}

#[test]
fn a_second_host_is_refused_and_touches_nothing() {
    let lun = Lun::default();
    let _first = lun.reserved_by(1, A, false).unwrap();
    let before = lun.inside();
    let others = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&others);
    lun.before_each(move |command, _| seen.lock().unwrap().extend((command != "read").then(|| command.to_owned())));
    let error = error(lun.reserved_by(2, B, false));
    assert!(others.lock().unwrap().is_empty());
    assert!(error.contains("/dev/lun is reserved by another host (key 0xa)") && error.contains("preempt"), "{error}");
    assert_eq!(lun.inside(), before);
    lun.lock().hook = None;
}

#[test]
fn with_preempt_a_second_host_takes_over_and_the_first_knows_by_whom() {
    let lun = Lun::default();
    let first = lun.reserved_by(1, A, false).unwrap();
    let second = lun.reserved_by(2, B, true).unwrap();
    assert_eq!(lun.keys(), [B, B]);
    assert_eq!(first.check().unwrap(), Standing::Lost { holder: Some(B) });
    assert_eq!(second.check().unwrap(), Standing::Held);
    let before = lun.inside();
    first.release().unwrap();
    drop(first);
    assert_eq!(lun.inside(), before, "what was lost is not released for the other");
}

#[test]
fn a_host_that_was_killed_goes_on_with_its_own_key() {
    let lun = Lun::default();
    std::mem::forget(lun.reserved_by(1, A, false).unwrap());
    let again = lun.reserved_by(1, A, false).unwrap();
    assert_eq!(again.check().unwrap(), Standing::Held);
    drop(again);
    // Its paths may have other numbers now.
    std::mem::forget(lun.reserved_by(1, A, false).unwrap());
    lun.change(|inside| {
        for (path, _) in &mut inside.registered {
            path.1 += 2;
        }
        inside.holder = Some(((1, 2), Kind::OURS));
    });
    let again = lun.reserved_by(1, A, false).unwrap();
    assert_eq!(again.check().unwrap(), Standing::Held);
}

#[test]
fn hosts_that_are_registered_without_a_reservation_could_write_so_they_are_refused_or_removed() {
    let lun = Lun::default();
    lun.change(|inside| inside.registered = (0..6).map(|n| ((9, n), 0x10 + u64::from(n))).collect());
    let refused = error(lun.reserved_by(1, A, false));
    assert!(refused.contains("(key 0x10, 0x11, 0x12, 0x13 and 2 more)"), "{refused}");
    assert_eq!(lun.keys().len(), 6);
    let taken = lun.reserved_by(1, A, true).unwrap();
    assert_eq!(lun.keys(), [A, A]);
    assert_eq!(taken.check().unwrap(), Standing::Held);
}

#[test]
fn a_reservation_of_another_type_is_taken_over_from_others_and_never_from_oneself() {
    for kind in [1, 2, 4, 5, 6] {
        let kind = Kind::from_linux(kind);
        let lun = Lun::default();
        lun.change(|inside| {
            inside.registered = vec![((2, 0), B)];
            inside.holder = Some(((2, 0), kind));
        });
        assert!(error(lun.reserved_by(1, A, false)).contains("(key 0xb)"));
        let taken = lun.reserved_by(1, A, true).unwrap();
        assert_eq!(taken.check().unwrap(), Standing::Held);
        drop(taken);
        if kind.is_held_by_all() {
            continue;
        }
        lun.change(|inside| {
            inside.registered = vec![((1, 0), A)];
            inside.holder = Some(((1, 0), kind));
        });
        let error = error(lun.reserved_by(1, A, false));
        assert!(error.contains(&kind.to_string()) && error.contains("sg_persist"), "{error}");
    }
}

#[test]
fn a_release_or_a_clear_by_others_is_a_loss_too_and_is_not_repaired() {
    let lun = Lun::default();
    let reservation = lun.reserved_by(1, A, false).unwrap();
    lun.change(|inside| inside.holder = None);
    assert_eq!(reservation.check().unwrap(), Standing::Lost { holder: None });
    lun.change(|inside| *inside = Inside::default());
    assert_eq!(reservation.check().unwrap(), Standing::Lost { holder: None });
    assert_eq!(lun.inside(), Inside::default(), "nothing is registered anew");
}

#[test]
fn a_lun_that_does_not_answer_is_not_lost() {
    let lun = Lun::default();
    let reservation = lun.reserved_by(1, A, false).unwrap();
    lun.kill(true);
    let unknown = reservation.check().unwrap_err().to_string();
    assert!(unknown.contains("cannot read the reservation of /dev/lun"), "{unknown}");
    assert!(reservation.release().is_err());
    lun.kill(false);
    assert_eq!(lun.keys(), [A, A], "it stays reserved, which was said");
}

#[test]
fn what_fails_half_way_takes_its_key_back() {
    for fails in ["reserve", "read"] {
        let lun = Lun::default();
        let mut armed = false;
        lun.before_each(move |command, inside| {
            inside.dead = armed && command == fails;
            armed |= command == "register";
            if inside.dead {
                armed = false;
            }
        });
        assert!(error(lun.reserved_by(1, A, true)).contains("no path"));
        assert!(lun.keys().is_empty(), "{fails}");
    }
}

#[test]
fn one_of_two_hosts_that_come_at_the_same_time_gets_the_lun() {
    let lun = Lun::default();
    // The other registers and reserves right before this one does.
    let mut once = false;
    lun.before_each(move |command, inside| {
        if command == "register" && !std::mem::replace(&mut once, true) {
            inside.registered = vec![((2, 0), B), ((2, 1), B)];
            inside.holder = Some(((2, 0), Kind::OURS));
        }
    });
    assert!(error(lun.reserved_by(1, A, false)).contains("(key 0xb)"));
    assert_eq!(lun.keys(), [B, B], "the loser took its key back");

    let lun = Lun::default();
    // The other registers before this one, is refused, and takes its key back.
    let mut reads = 0;
    lun.before_each(move |command, inside| match command {
        "register" => inside.registered = vec![((2, 0), B), ((2, 1), B)],
        "read" => {
            reads += 1;
            if reads == 4 {
                inside.forget(|_, key| key == B);
            }
        }
        _ => {}
    });
    let winner = lun.reserved_by(1, A, false).unwrap();
    assert_eq!(winner.check().unwrap(), Standing::Held);
    lun.lock().hook = None;

    let lun = Lun::default();
    // Both preempt, and the other is the last to do so.
    let mut once = false;
    lun.before_each(move |command, inside| {
        if command == "reserve" && !std::mem::replace(&mut once, true) {
            inside.registered = vec![((2, 0), B), ((2, 1), B)];
            inside.holder = Some(((2, 0), Kind::OURS));
        }
    });
    let error = error(lun.reserved_by(1, A, true));
    assert!(error.contains("another host (key 0xb) took /dev/lun at the same time"), "{error}");

    let lun = Lun::default();
    // The other ends right after this one registered, and clears the LUN.
    let mut once = false;
    lun.before_each(move |command, inside| {
        if command == "reserve" && !std::mem::replace(&mut once, true) {
            *inside = Inside::default();
        }
    });
    let winner = lun.reserved_by(1, A, true).unwrap();
    assert_eq!(winner.check().unwrap(), Standing::Held);
}

#[test]
fn a_path_that_died_meanwhile_keeps_no_key_behind() {
    let lun = Lun::default();
    let host = Host { lun: lun.clone(), paths: vec![(1, 0), (1, 1)], gone: [false; 2] };
    let reservation = Reservation::acquire_on(Box::new(host), Path::new("/dev/lun"), &options(A, false)).unwrap();
    std::mem::forget(reservation);
    let host = Host { lun: lun.clone(), paths: vec![(1, 0), (1, 1)], gone: [true, false] };
    let over = AtomicBool::new(false);
    let reservation = Reservation { target: Box::new(host), path: "/dev/lun".into(), key: A, over };
    reservation.release().unwrap();
    assert_eq!(lun.inside(), Inside::default());

    // With another host there, clearing would remove its key as well.
    std::mem::forget(lun.reserved_by(1, A, false).unwrap());
    lun.change(|inside| inside.registered.push(((2, 0), B)));
    let host = Host { lun: lun.clone(), paths: vec![(1, 0), (1, 1)], gone: [true, false] };
    let over = AtomicBool::new(false);
    let reservation = Reservation { target: Box::new(host), path: "/dev/lun".into(), key: A, over };
    assert!(reservation.release().is_err());
    assert!(lun.keys().contains(&B));
}

#[test]
fn a_reservation_is_kept_while_requests_may_still_write() {
    let lun = Lun::default();
    let guard = Guard::new(lun.reserved_by(1, A, false).unwrap());
    let error = guard.release(3).unwrap_err().to_string();
    assert!(error.contains("3 of its requests are still in flight"), "{error}");
    guard.leave(0);
    drop(guard);
    assert_eq!(lun.keys(), [A, A]);
}
