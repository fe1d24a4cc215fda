//! Where the programs under test are: beside the one that tests them.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use weft_localmesh::Programs;

/// The programs of the build that this process belongs to.
///
/// # Errors
///
/// They have not been built.
pub fn built() -> anyhow::Result<Programs> {
    let own = std::env::current_exe().context("this program's own path cannot be told")?;
    let programs = Programs::beside(&dir(&own).join("any"));
    for program in [&programs.weft, &programs.controller, &programs.proxy] {
        ensure!(
            program.is_file(),
            "{} is missing; build the programs under test with `cargo build --workspace --bins`, as `cargo xtask test` does",
            program.display()
        );
    }
    Ok(programs)
}

/// Another program of the build.
///
/// # Errors
///
/// It has not been built.
pub fn built_one(name: &str) -> anyhow::Result<PathBuf> {
    let program = built()?.weft.with_file_name(name);
    ensure!(
        program.is_file(),
        "{} is missing; build it with `cargo build --workspace --bins`",
        program.display()
    );
    Ok(program)
}

/// Programs are in `target/<profile>/`, tests in `deps/` below it.
fn dir(own: &Path) -> PathBuf {
    let dir = own.parent().unwrap_or(Path::new("."));
    let above = dir.ends_with("deps").then(|| dir.parent()).flatten();
    above.unwrap_or(dir).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_and_programs_find_the_same_folder() {
        for own in ["/t/debug/weft-smoke", "/t/debug/deps/stories-0123"] {
            assert_eq!(dir(Path::new(own)), Path::new("/t/debug"));
        }
    }
}
