//! What can be typed.

use crate::command::{
    apply, check, completion, delete, describe, down, get, log, replay, rollout, sim, sql, status, token, up,
    verify, version, watchdog, why,
};
use crate::context::ContextArgs;
use crate::sample;
use clap::{Parser, Subcommand};

const AFTER_HELP: &str = "Exit status:
  0  done; what was looked at is as it should be
  1  it could not be done
  2  what was looked at is not as it should be (check, verify, replay --check, why: refused)
  3  somebody else changed the resource first (version conflict)
  4  denied: the credential's role is not enough

Start here: `weft up` runs a whole mesh on this machine; then, in another terminal, `weft status`.";

/// The command line of the mesh
#[derive(Debug, Parser)]
#[command(name = "weft", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole mesh on this machine until Ctrl-C
    Up(up::Args),
    /// Stop the mesh that `weft up` runs
    Down(down::Args),
    /// Check resource files without a mesh, or without -f the mesh and this machine
    Check(check::Args),
    /// The mesh at a glance
    Status(status::Args),
    /// Make resources what files say, all of them or none
    Apply(apply::Args),
    /// List resources
    Get(get::Args),
    /// Everything about one resource, with its last changes
    Describe(describe::Args),
    /// Delete resources, all of them or none
    Delete(delete::Args),
    /// What happened: the event log
    Log(log::Args),
    /// Policies that some sidecars try first: how that goes, or to end it
    Rollout(rollout::Args),
    /// Whether a connection would pass, and why
    Why(why::Args),
    /// Fold the log again up to a version, read from the database
    Replay(replay::Args),
    /// Prove that the log is whole and that the stored state follows from it, read from the database
    Verify(verify::Args),
    /// Let a fleet of simulated sidecars join, change things, and measure how that spreads
    Sim(sim::Args),
    /// Join tokens
    Token(token::Args),
    /// Ask the status views in SQL, read-only
    Sql(sql::Args),
    /// The version of this program and of the mesh
    Version(version::Args),
    /// Print a completion script for a shell
    Completion(completion::Args),
    /// The sample services of the local mesh
    #[command(hide = true)]
    Sample(sample::Args),
    /// Stops a local mesh whose owner was killed
    #[command(hide = true)]
    Watchdog(watchdog::Args),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_the_documentation_shows_can_be_typed() {
        for line in [
            "weft up --base-port 8400",
            "weft down",
            "weft check -f mesh.yaml",
            "weft check",
            "weft status --at 42 -o json",
            "weft apply -f mesh.yaml --if-version 3 --reason why --wait",
            "weft apply -f - --dry-run",
            "weft apply -f mesh.yaml --canary 5% --watch 2m --tolerance 0.5% --wait",
            "weft rollout",
            "weft rollout abort --reason why",
            "weft rollout advance",
            "weft get services",
            "weft get security db --at 1.42 -o yaml",
            "weft describe instance api/api-1",
            "weft delete security default/db --if-version 2",
            "weft delete -f mesh.yaml",
            "weft log -n 5 -f --scope security --type SecurityPolicySet --actor admin",
            "weft log 42",
            "weft log adopt-history --reason 'the backup is all there is' --yes",
            "weft log --since '10m ago'",
            "weft why web db:5432 --at 42",
            "weft replay --to 42 --check",
            "weft verify -o json",
            "weft token create --service api --instance api-3 --ttl 10m --out token",
            "weft sql 'select 1' -o json",
            "weft --context c.json version",
            "weft status --context c.json",
            "weft completion bash",
        ] {
            // The quoted words are the only ones with spaces.
            let mut words = Vec::new();
            for (index, part) in line.split('\'').enumerate() {
                if index % 2 == 1 {
                    words.push(part.to_owned());
                } else {
                    words.extend(part.split_whitespace().map(str::to_owned));
                }
            }
            Arguments::try_parse_from(&words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in
            ["weft", "weft apply", "weft get nothing", "weft why web", "weft delete", "weft status --at soon"]
        {
            assert!(Arguments::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
