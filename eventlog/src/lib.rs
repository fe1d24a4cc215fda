//! The append-only event log on PostgreSQL.
//!
//! Responsible for what is durable and in which order: every event has a gapless *position* in the whole log, a
//! gapless *version* in its *scope*, and a hash that chains it to the one before it. Writers state the version that
//! they expect of a scope, and of two that expect the same one wins.
//!
//! Deliberately absent: what an event means (payloads are opaque JSON), what is derived from events, and who may
//! append.
//!
//! Invariants, each kept in one place:
//! - Position order is commit order, without gaps, so a reader that asks for `position > cursor` misses nothing
//!   (`append.rs`, and the lock in `epoch.rs`).
//! - An accepted command is recorded exactly once, whatever is retried (`append.rs`).
//! - A recorded event never changes (triggers in `migrations/0001_event_log.sql`), and if it does, that shows
//!   ([`hash`], [`verify()`]).
//! - A database that lost events is noticed, by whoever appended or read them (`append/writer.rs`, `tail.rs`), and its
//!   next life is another epoch (`epoch.rs`). What was found stops every writer until somebody decides (`rewind.rs`).
//! - Reading never waits for writing ([`Reader`], [`Tail`]); notifications are only hints (`notify.rs`).
//!
//! Called by the controller (append), the projector and the API (read, tail) and the command line (verify). Calls
//! PostgreSQL through tokio-postgres, which pipelines, and through sqlx for migrations. Read `tests/sql/concurrency.rs`
//! for what it promises and `src/append/decide.rs` for how requests win or lose.

mod append;
mod archive;
mod epoch;
mod event;
pub mod hash;
mod log;
mod migrate;
mod notify;
mod page;
mod partitions;
mod read;
mod request;
mod rewind;
mod segment;
mod session;
mod settings;
mod tail;
mod verify;

pub use append::{AppendError, Appender, OUTCOME_KEPT, decide};
pub use archive::{ArchiveConfig, ArchiveError, ArchiveProgress, ArchiveReport, SEALED_AGE_MIN, archive};
pub use event::{NewEvent, RecordedEvent, UnixMicros};
pub use hash::EventHash;
pub use log::{EventLog, LogConfig, OpenError, SHUTDOWN_MAX};
pub use migrate::{MigrateError, migrate};
pub use page::{EventView, Page};
pub use partitions::lay_out;
pub use read::{CommandOutcome, Head, PAGE_BYTES_MAX, PAGE_EVENTS_MAX, Reader};
pub use request::{
    ACTOR_BYTES_MAX, AppendRequest, Appended, EVENTS_PER_REQUEST_MAX, Malformed, PAYLOAD_BYTES_MAX,
    REASON_BYTES_MAX, REQUEST_BYTES_MAX, SCHEMA_MAX, SCOPE_BYTES_MAX, SCOPES_PER_REQUEST_MAX, ScopeAppend,
    TYPE_BYTES_MAX, TooLarge,
};
pub use rewind::{
    Adopt, AdoptError, Adoption, EPOCHS_UNSEEN_MAX, Point, Reported, Rewind, Seen, adopt, epoch_to_adopt,
    report_rewind,
};
pub use segment::SegmentError;
pub use session::StoreError;
pub use settings::SettingsError;
pub use tail::{Tail, first_stray};
/// How to reach a database: parsed from a URL or a `key=value` list, unix sockets included.
pub use tokio_postgres::Config as ConnectConfig;
pub use verify::{Contradiction, Defect, VerifyError, VerifyProgress, VerifyReport, verify};
