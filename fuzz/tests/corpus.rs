//! The corpus, played without a fuzzer: what was found once stays found.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::path::Path;
use std::sync::Once;

/// Plays the lines of `fuzz/corpus/NAME.hex`; those that begin with `#` say something about the next one.
fn replay(name: &str) {
    static ALARM: Once = Once::new();
    ALARM.call_once(|| {
        // A worker that panics must not go unnoticed: its device would only look broken.
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            usual(panic);
            std::process::abort();
        }));
    });
    let play = rackvisor_fuzz::target(name).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name).with_extension("hex");
    let text = fs::read_to_string(&path).unwrap();
    let inputs: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(!inputs.is_empty(), "{} is empty", path.display());
    for (number, line) in inputs.iter().enumerate() {
        let byte = |at: usize| u8::from_str_radix(&line[at..at + 2], 16).unwrap();
        let input: Vec<u8> = (0..line.len() / 2).map(|at| byte(2 * at)).collect();
        eprintln!("{name}: input {number}");
        play(&input);
    }
    play(&[]);
}

macro_rules! replays {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            replay($name);
        })*

        #[test]
        fn every_target_has_a_corpus_that_is_played() {
            let played = [$($name),*];
            assert_eq!(rackvisor_fuzz::TARGETS.map(|(name, _)| name), played);
        }
    };
}

replays! {
    the_registers_of_a_machine_survive_the_corpus: "platform",
    a_disk_survives_the_corpus: "block",
    a_network_card_survives_the_corpus: "net",
    a_random_number_device_survives_the_corpus: "rng",
    a_memory_balloon_survives_the_corpus: "balloon",
    a_tpm_survives_the_corpus: "tpm",
    the_api_survives_the_corpus: "http",
    configurations_survive_the_corpus: "config",
    images_survive_the_corpus: "image",
}
