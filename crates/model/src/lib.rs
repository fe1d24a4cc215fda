//! What the mesh is: names, versions, scopes, the events that can happen to each scope and the commands that cause
//! them.
//!
//! Each kind of scope has a module with its state, its events, its commands and two functions:
//! `decide(state, command) -> events | Rejection` and `apply(state, event) -> state`. Start with [`event`], which
//! lists everything that can happen, then read a scope, for example [`membership`].
//!
//! Pure: no I/O, no clock, no randomness; `now` is an argument. What follows from many scopes together (routing,
//! verdicts, snapshots) is in `weft-routing`; how events are stored is in `weft-eventlog`.

pub mod ca;
pub mod chain;
pub mod command;
pub mod damping;
pub mod dns_name;
pub mod event;
pub mod health;
pub mod id;
pub mod identity;
pub mod membership;
pub mod mesh;
pub mod reason;
pub mod rejection;
pub mod rollout;
pub mod scope;
pub mod security;
pub mod service;
pub mod stored;
pub mod time;
pub mod token;
pub mod traffic;
pub mod version;

pub use chain::Chain;
pub use command::Command;
pub use dns_name::DnsName;
pub use event::{DecodeError, Event, Fact};
pub use id::{IdError, InstanceId, Name, Namespace, Port, ServiceName, TrustDomain};
pub use reason::CloseReason;
pub use rejection::Rejection;
pub use scope::{Scope, SecurityScope, TokenId, TrafficScope};
pub use stored::{Decoder, StoredEvent};
pub use time::Timestamp;
pub use version::{ConfigVersion, Epoch, ExpectedVersion, Position, ScopeVersion, Version};
