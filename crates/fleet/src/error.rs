//! What can go wrong with a fleet.

use weft_client::CallError;

/// A fleet does not do what was asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FleetError {
    /// A controller refuses, or none answers.
    #[error("{what} failed")]
    Call {
        /// What was called.
        what: &'static str,
        /// Why.
        #[source]
        source: CallError,
    },
    /// The fleet cannot be as it was planned.
    #[error("{0}")]
    Plan(String),
    /// A sidecar cannot use what it was given, or has no key.
    #[error("a simulated sidecar has no identity: {0}")]
    Identity(String),
    /// Some sidecars did not get as far as the others.
    #[error("only {done} of {of} sidecars {what}; the last fault of a session was: {last_fault}")]
    Stuck {
        /// What they did.
        what: &'static str,
        /// How many did.
        done: usize,
        /// Of how many.
        of: usize,
        /// Why a session failed.
        last_fault: String,
    },
}

impl FleetError {
    pub(crate) fn of(what: &'static str) -> impl Fn(CallError) -> Self {
        move |source| Self::Call { what, source }
    }
}
