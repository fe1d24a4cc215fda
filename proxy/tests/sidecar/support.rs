//! What the tests are written in.

pub(crate) mod app;
pub(crate) mod controller;
pub(crate) mod sidecar;
pub(crate) mod tunnel;

pub(crate) use app::App;
pub(crate) use controller::Controller;
pub(crate) use sidecar::Sidecar;

use std::time::Duration;

/// Long enough for a busy machine; only a failing test waits so long.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
