//! What a failed call means.

use prost::Message;
use std::error::Error;
use tonic::{Code, Status};
use weft_proto::v1::{ErrorDetail, error_detail::Detail};

/// A call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// No controller answered. Whether a command was executed is not known: repeat it with the same id.
    #[error("no controller answers: {0}")]
    Unreachable(String),
    /// A scope is not at the version that the caller expected. Nothing was changed.
    #[error("{scope} is at version {current}, not {expected}")]
    Conflict {
        /// The change at fault, counted from 0.
        change: Option<u32>,
        /// The scope.
        scope: String,
        /// What the caller expected.
        expected: String,
        /// Where it is; 0 if it has no event.
        current: u64,
    },
    /// A rule of the mesh refuses the command. Nothing was changed.
    #[error("{message}")]
    Rejected {
        /// The change at fault, counted from 0.
        change: Option<u32>,
        /// The scope.
        scope: String,
        /// The field at fault; empty if it is not about one.
        field: String,
        /// For a stale observation: the revision that is recorded; else 0.
        current_revision: u64,
        /// For a connection that a policy does not admit: the rule or default; else empty.
        rule: Box<str>,
        /// Why.
        message: String,
    },
    /// The request makes no sense. Nothing was changed.
    #[error("{message}")]
    Invalid {
        /// The change at fault, counted from 0.
        change: Option<u32>,
        /// Why.
        message: String,
    },
    /// What was asked for is not there.
    #[error("{0}")]
    NotFound(String),
    /// The caller may not do this, or showed no identity.
    #[error("denied: {0}")]
    Denied(String),
    /// The controller has more to do than it can; nothing was changed. Try again soon.
    #[error("controller is overloaded: {0}")]
    Overloaded(String),
    /// A controller answers, and cannot do it now: its database is away, or it is about to stop. Whether a command was
    /// executed is not known: repeat it with the same id.
    #[error("the controller cannot do this now: {0}")]
    Unavailable(String),
    /// Anything else.
    #[error("{}: {message}", code.description())]
    Other {
        /// The gRPC code.
        code: Code,
        /// The controller's words.
        message: String,
    },
}

impl CallError {
    /// The log lost events that somebody has seen, and an operator has to decide.
    #[must_use]
    pub fn is_rewound(&self) -> bool {
        matches!(self, Self::Other { code: Code::FailedPrecondition, message } if message.contains("LOG_REWOUND"))
    }

    /// Whether the same call may succeed if it is simply repeated.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Unavailable(_) | Self::Overloaded(_))
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let ErrorDetail { change, detail } = ErrorDetail::decode(status.details()).unwrap_or_default();
        let message = status.message().to_owned();
        match (status.code(), detail) {
            (_, Some(Detail::Conflict(conflict))) => Self::Conflict {
                change,
                scope: conflict.scope,
                expected: conflict.expected,
                current: conflict.current_version,
            },
            (_, Some(Detail::Rejected(rejected))) => Self::Rejected {
                change,
                scope: rejected.scope,
                field: rejected.field,
                current_revision: rejected.current_revision,
                rule: rejected.rule.into(),
                message,
            },
            (Code::InvalidArgument, None) => Self::Invalid { change, message },
            (Code::NotFound, None) => Self::NotFound(message),
            (Code::PermissionDenied | Code::Unauthenticated, None) => Self::Denied(message),
            (Code::ResourceExhausted, None) => Self::Overloaded(message),
            (Code::Unavailable, None) => match innermost(&status) {
                Some(cause) => Self::Unreachable(cause),
                None => Self::Unavailable(message),
            },
            // hyper reports a connection that broke in the middle as unknown or cancelled, with a source.
            (Code::Unknown | Code::Cancelled | Code::Internal, None) if status.source().is_some() => {
                Self::Unreachable(innermost(&status).unwrap_or(message))
            }
            (code, None) => Self::Other { code, message },
        }
    }
}

/// The cause at the bottom: which address failed and how, instead of "transport error".
fn innermost(status: &Status) -> Option<String> {
    let mut cause = status.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_proto::v1::Conflict;

    #[test]
    fn a_conflict_carries_the_current_version() {
        let conflict = Conflict { scope: "mesh".into(), expected: "1".into(), current_version: 2 };
        let detail = ErrorDetail { change: Some(3), detail: Some(Detail::Conflict(conflict)) };
        let status = Status::with_details(Code::Aborted, "conflict", detail.encode_to_vec().into());
        let error = CallError::from(status);
        assert!(matches!(error, CallError::Conflict { change: Some(3), current: 2, .. }));
        assert_eq!(error.to_string(), "mesh is at version 2, not 1");
    }

    #[test]
    fn a_rewound_log_is_told_from_a_refusal() {
        let rewound = Status::failed_precondition("LOG_REWOUND: event 1.9 is gone");
        assert!(CallError::from(rewound).is_rewound());
        assert!(!CallError::from(Status::failed_precondition("no such service")).is_rewound());
        assert!(!CallError::from(Status::unavailable("LOG_REWOUND")).is_rewound());
    }

    #[test]
    fn details_that_do_not_decode_are_ignored() {
        let status = Status::with_details(Code::NotFound, "no such thing", vec![0xff; 9].into());
        assert!(
            matches!(CallError::from(status), CallError::NotFound(message) if message == "no such thing")
        );
    }
}
