//! The command line of `weft-proxy`: the sidecar itself, and the commands around it.
//!
//! Without a command it is the sidecar, as it always was. A command has flags of its own; what the sidecar requires is not required
//! then, and its flags beside a command are a mistake that is told.

use crate::config::Cli;
use crate::gate::Gate;
use crate::redirect::rules::Redirect;
use clap::error::Error;
use clap::{CommandFactory, FromArgMatches, Subcommand};
use std::ffi::OsString;

/// What `weft-proxy` is asked to do.
#[derive(Debug)]
pub enum Invocation {
    /// To be the sidecar.
    Sidecar(Box<Cli>),
    /// A command.
    Command(Command),
}

/// What `weft-proxy` does beside being the sidecar.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Wait until the sidecar is ready, then run an app in its place: signals go to it, its exit status comes back
    Gate(Gate),
    /// Have the kernel lead connections that programs open to the sidecar's --redirect-listen, by a table of its own in nftables
    Redirect(Redirect),
}

impl Invocation {
    /// Reads the command line of this process; ends the process if there is a mistake in it, or help is asked for.
    #[must_use]
    pub fn parse() -> Self {
        Self::try_parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// Reads a command line.
    ///
    /// # Errors
    /// If there is a mistake in it, or it asks for help or the version.
    pub fn try_parse_from(
        line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, Error> {
        let mut command = Self::command();
        let matches = command.try_get_matches_from_mut(line)?;
        let invocation = if matches.subcommand_name().is_some() {
            Command::from_arg_matches(&matches).map(Self::Command)
        } else {
            Cli::from_arg_matches(&matches).map(|cli| Self::Sidecar(Box::new(cli)))
        };
        invocation.map_err(|error| error.format(&mut command))
    }

    /// All that there is on the command line.
    #[must_use]
    pub fn command() -> clap::Command {
        let sidecar = Cli::command();
        let about = sidecar.get_about().cloned();
        Command::augment_subcommands(sidecar)
            // The sidecar's, not that of the list of commands.
            .about(about.unwrap_or_default())
            .subcommand_negates_reqs(true)
            .args_conflicts_with_subcommands(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Invocation::command().debug_assert();
        assert!(Invocation::command().render_help().to_string().starts_with("The Weft sidecar"));
    }

    #[test]
    fn without_a_command_it_is_the_sidecar() {
        let line =
            ["weft-proxy", "--controller=127.0.0.1:7400", "--instance=default/web/web-1", "--state-dir=/x"];
        assert!(matches!(Invocation::try_parse_from(line), Ok(Invocation::Sidecar(_))));
        let error = Invocation::try_parse_from(["weft-proxy"]).unwrap_err().to_string();
        assert!(error.contains("--instance"), "{error}");
    }

    #[test]
    fn a_command_needs_none_of_the_sidecars_flags_and_takes_none() {
        let line = ["weft-proxy", "gate", "--timeout=5s", "--", "app", "--app-flag"];
        let Ok(Invocation::Command(Command::Gate(gate))) = Invocation::try_parse_from(line) else {
            panic!("no gate");
        };
        assert_eq!(gate.app, ["app", "--app-flag"]);
        let error = Invocation::try_parse_from(["weft-proxy", "gate"]).unwrap_err().to_string();
        assert!(error.contains("APP"), "{error}");
        let both = ["weft-proxy", "--instance=default/web/web-1", "gate", "--", "app"];
        assert!(Invocation::try_parse_from(both).is_err());
    }
}
