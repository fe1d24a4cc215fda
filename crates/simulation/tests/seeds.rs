//! Some seeds of the simulation, as a guard: nothing is wrong with the control plane as it is, whatever is planted is found, and a
//! seed is the same run each time.

use clap::ValueEnum;
use weft_simulation::{Plant, run};

/// Seeds of the guard; `cargo xtask simulate` runs thousands.
const SEEDS: u64 = 200;
/// Seeds within which a planted bug is found; most take one.
const PLANTED_SEEDS: u64 = 1_000;
/// Where to look for what is rare: somewhat before the first such seed, to spare the time of those before it.
const RARE: &[(Plant, u64)] = &[(Plant::SkipTermCheck, 30), (Plant::TrustCheckpoint, 120)];

#[test]
fn nothing_is_wrong() {
    let (mut rewound, mut bounded, mut events) = (0, 0, 0);
    for seed in 1..=SEEDS {
        let outcome = run(seed, None, false);
        assert_eq!(
            outcome.violation, None,
            "seed {seed}: {:#?}; again with: cargo xtask simulate --seed {seed}",
            outcome.tail
        );
        rewound += u64::from(outcome.rewound);
        bounded += u64::from(outcome.bounded);
        events += outcome.events;
    }
    assert!(rewound > SEEDS / 10 && bounded > SEEDS / 2 && events > 1_000, "{rewound} {bounded} {events}");
}

#[test]
fn a_seed_is_one_run() {
    for seed in [1, 7, 23] {
        let (first, second) = (run(seed, None, false), run(seed, None, false));
        assert_eq!((first.trace, first.lines), (second.trace, second.lines), "seed {seed}");
    }
}

#[test]
fn what_is_planted_is_found() {
    for plant in Plant::value_variants() {
        let from = RARE.iter().find(|(rare, _)| rare == plant).map_or(1, |(_, from)| *from);
        let found = (from..from + PLANTED_SEEDS).find_map(|seed| run(seed, Some(*plant), false).violation);
        assert!(found.is_some(), "{} was not found", plant.name());
    }
}
