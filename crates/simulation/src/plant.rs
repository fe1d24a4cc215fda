//! Bugs to plant: each is a way in which a shell around the pure decisions, or the database, could be wrong. They exist in this
//! crate only; the decisions themselves have no switch. A run that does not find one within a thousand seeds proves little when it finds
//! nothing.

use serde::Serialize;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Plant {
    /// The projector's commit does not look at the term.
    SkipTermCheck,
    /// A follower publishes up to a checkpoint, whichever history it is of.
    TrustCheckpoint,
    /// The projector's commit does not look whether the log has the event that its rows end with.
    ProjectLost,
    /// A sidecar takes a snapshot that is older than its own.
    OlderVersion,
    /// A notice's patch lacks a shard, and its hash is announced to match.
    DropPatch,
    /// A leader publishes before its commit is answered.
    PublishBeforeCommit,
    /// A subscription forgets what it told.
    ForgetTold,
    /// A subscription is not woken by its class's feed.
    SilentFeed,
    /// A sidecar takes the disk for written before it is.
    DiskAfterAck,
    /// A sidecar does not read its disk when it starts.
    ForgetDisk,
    /// An adoption does not open an epoch above those that were seen.
    KeepEpoch,
    /// Events are appended while a finding stands.
    AppendWhileRewound,
    /// The log does not look whether a command was recorded before.
    ForgetOutcomes,
    /// A batch that was decided ahead is not checked against the log's end.
    SkipGround,
    /// A projector that loses the lease loses what it had not written yet.
    DropPending,
    /// A start goes on from a checkpoint of the fold whose last event is not in the log.
    TrustFold,
    /// A projector publishes what it has folded, whoever wrote it, if anybody did.
    PublishFolded,
}

impl Plant {
    /// As it is written on the command line.
    #[must_use]
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}
