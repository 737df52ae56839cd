//! What becomes of the driver's commands. All of it happens on the first worker.

use std::io;
use std::sync::atomic::Ordering;

use super::control::{Command, Outcome};
use super::features::tap_offload;
use super::shared::Shared;
use super::steering::config::RssConfig;

/// Carries out a command of the control queue.
pub(super) fn obey(shared: &Shared, command: Command) -> Outcome {
    let done = match &command {
        &Command::Offloads(offloads) => {
            let done = shared.tap.set_offload(tap_offload(offloads));
            if done.is_ok() {
                shared.offloads.store(offloads, Ordering::SeqCst);
                shared.wake_kernel_users();
            }
            done
        }
        &Command::Pairs(pairs) => steer_by_kernel(shared).and_then(|()| use_pairs(shared, pairs)),
        Command::Steer(config) => steer(shared, config),
        Command::Hash(config) => {
            shared.hasher.set(Some(config.hasher()));
            steer_by_kernel(shared)
        }
        Command::Filter(change) => {
            shared.filter.change(|filter| filter.apply(change));
            shared.filter_tap();
            Ok(())
        }
        Command::Announced => {
            shared.announcing.store(false, Ordering::SeqCst);
            Ok(())
        }
        &Command::Coalesce(queues, parameters) => {
            shared.coalescing.set(queues, parameters);
            // What is held back may be due by the new ones.
            shared.wake_all();
            Ok(())
        }
        &Command::TellCoalescing(queue) => return Outcome::Told(shared.coalescing.get(queue)),
    };
    if let Err(error) = done {
        shared.command_refused(&command, &error);
        return Outcome::Refused;
    }
    let others = shared.max_pairs().saturating_sub(1);
    if others == 0 || !matches!(command, Command::Pairs(_) | Command::Steer(_) | Command::Hash(_)) {
        return Outcome::Done;
    }
    shared.pairs_waiting.store(others, Ordering::SeqCst);
    shared.pairs_generation.fetch_add(1, Ordering::SeqCst);
    (1..shared.wakes.len()).for_each(|worker| shared.wake(worker));
    Outcome::Waiting
}

/// Uses so many pairs from now on. What the tap has of queues beyond goes out of service when all workers have heard of it.
fn use_pairs(shared: &Shared, pairs: u16) -> io::Result<()> {
    let serving = shared.pairs.load(Ordering::SeqCst).max(pairs);
    let done = shared.tap.use_queues(serving.into()).map(|()| shared.pairs.store(pairs, Ordering::SeqCst));
    // Also if it failed: the tap's filter went with the change.
    shared.filter_tap();
    done
}

fn steer_by_kernel(shared: &Shared) -> io::Result<()> {
    shared.steered.store(false, Ordering::SeqCst);
    shared.tap.steer(None)
}

/// Steers as `config` says. All queues that it names are in service before it is in force, and those that it does not name
/// go out of service after.
fn steer(shared: &Shared, config: &RssConfig) -> io::Result<()> {
    let Some(steering) = &shared.steering else { return Err(io::ErrorKind::Unsupported.into()) };
    let hasher = config.hash.hasher();
    let former = shared.pairs.load(Ordering::SeqCst);
    shared.tap.use_queues(former.max(config.pairs()).into())?;
    steering.set(config, &hasher);
    shared.tap.steer(Some(steering.program()))?;
    shared.steered.store(true, Ordering::SeqCst);
    shared.hasher.set(Some(hasher));
    use_pairs(shared, config.pairs())
}
