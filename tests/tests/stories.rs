//! Stories: what somebody lives through with a whole mesh of real processes, one at a time.
//!
//! What the smoke run tries is not repeated here; it is a story itself. `.config/nextest.toml` keeps the tests below
//! `stories::` from running beside each other. The programs must have been built, as `cargo xtask test` does.

mod stories {
    mod answers;
    mod archive;
    mod bad_input;
    mod bytes;
    mod controllers;
    mod crowd;
    mod database;
    mod demand;
    mod protocols;
    mod restarts;
    mod rollout;
    mod smoke;
    mod up;
    mod ways_in;
}

/// A file that nobody declares is a story that nobody runs.
#[test]
fn every_story_is_declared() {
    let declared: Vec<&str> = include_str!("stories.rs")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stories");
    let mut files: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.trim_end_matches(".rs").to_owned())
        .collect();
    files.sort();
    assert_eq!(files, declared, "declare each file of {} in tests/stories.rs, in order", dir.display());
}
