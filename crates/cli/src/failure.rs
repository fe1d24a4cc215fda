//! What a person is told when something does not work, and the exit status that scripts read.

use std::fmt;
use std::process::ExitCode;
use weft_client::CallError;

/// The result of a command or a part of it.
pub(crate) type Outcome<T> = Result<T, Failure>;

/// How a command ends. The numbers are documented in `weft --help` and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It did what it was asked, and what it looked at is as it should be.
    Ok = 0,
    /// It could not.
    Fault = 1,
    /// It looked, and what it looked at is not as it should be.
    CheckFailed = 2,
    /// Somebody else changed the resource first.
    Conflict = 3,
    /// The caller may not do this.
    Denied = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What went wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    what: String,
    next: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), next: None }
    }

    pub(crate) fn fault(what: impl Into<String>) -> Self {
        Self::new(Exit::Fault, what)
    }

    /// An error and everything that caused it, in one line.
    pub(crate) fn from_error(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::fault(chain(error))
    }

    /// In one line, for a list.
    pub(crate) fn brief(&self) -> String {
        let what = crate::output::text::printable(&self.what);
        self.next
            .as_ref()
            .map_or(what.clone(), |next| format!("{what}; {}", crate::output::text::printable(next)))
    }

    /// The next step, unless it names one.
    #[must_use]
    pub(crate) fn or_next(self, next: &str) -> Self {
        if self.next.is_some() { self } else { self.next(next) }
    }

    /// The next step.
    #[must_use]
    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }
}

/// An error and everything that caused it.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        let more = deeper.to_string();
        // Some libraries print their cause in their own message.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = deeper.source();
    }
    text
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", crate::output::text::printable_lines(&self.what))?;
        match &self.next {
            Some(next) => write!(f, "\n  next: {}", crate::output::text::printable_lines(next)),
            None => Ok(()),
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let what = error.to_string();
        match error {
            CallError::Conflict { scope, expected, current, .. } => {
                let what = format!("{scope} is at version {current}, not {expected}; nothing was changed");
                Self::new(Exit::Conflict, what)
                    .next("look at it with `weft get`, and apply again with the current version")
            }
            CallError::Denied(_) => Self::new(Exit::Denied, what).next(
                "use a credential with a role that may do this: `weft-controller operator issue --help`",
            ),
            CallError::Unreachable(why) if why.contains("UnknownIssuer") => Self::fault(what).next(
                "another mesh answers at this address; name the right one with --context or WEFT_CONTEXT",
            ),
            CallError::Unreachable(_) => Self::fault(what).next(
                "start a local mesh with `weft up`, or name another mesh with --context or WEFT_CONTEXT",
            ),
            CallError::Overloaded(_) | CallError::Unavailable(_) => {
                Self::fault(what).next("try again in a moment")
            }
            CallError::Rejected { .. }
            | CallError::Invalid { .. }
            | CallError::NotFound(_)
            | CallError::Other { .. } => Self::fault(what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_tells_the_current_version_and_has_its_own_exit_status() {
        let error = CallError::Conflict {
            change: Some(0),
            scope: "security/default/db".into(),
            expected: "3".into(),
            current: 4,
        };
        let failure = Failure::from(error);
        assert_eq!(failure.exit, Exit::Conflict);
        assert!(failure.to_string().contains("security/default/db is at version 4, not 3"));
    }

    #[test]
    fn nobody_there_and_not_allowed_name_the_next_step() {
        let away = Failure::from(CallError::Unreachable("127.0.0.1:7400: refused".into()));
        assert_eq!(away.exit, Exit::Fault);
        let text = away.to_string();
        assert!(text.contains("127.0.0.1:7400") && text.contains("`weft up`"), "{text}");
        let other = Failure::from(CallError::Unreachable("127.0.0.1:7400: UnknownIssuer".into()));
        assert!(other.to_string().contains("another mesh answers"));
        assert_eq!(Failure::from(CallError::Denied("viewer".into())).exit, Exit::Denied);
    }

    #[test]
    fn what_a_server_says_cannot_steer_the_terminal() {
        let failure = Failure::fault("bad \u{1b}[2J name");
        assert!(!failure.to_string().contains('\u{1b}'));
    }
}
