//! Proves that the stored rows are what the log says: the fold from the first event to the checkpoint, compared row by
//! row. On its way it passes the positions of the stored checkpoints of the fold, and compares those, too; it never
//! begins with one.

use std::fmt;
use weft_eventlog::Reader;
use weft_model::{ConfigVersion, Position};
use weft_routing::{Checkpoint, Hash, Projection};

use crate::checkpoint::{self, Unusable};
use crate::fold::{FoldProgress, FoldToError};
use crate::replay::Replay;
use crate::rows::{RowChanges, Table};
use crate::store::{Store, StoreError, StoredCheckpoint};

/// A stored row is not what the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// A row is missing.
    Missing {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
    },
    /// A row is there that should not be.
    Surplus {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
    },
    /// A row has other content.
    Content {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
    },
    /// A row's body does not have the hash beside it.
    Hash {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
    },
    /// The checkpoint claims another epoch than its event has.
    Epoch {
        /// The stored checkpoint.
        stored: ConfigVersion,
        /// What the log says.
        computed: ConfigVersion,
    },
    /// A checkpoint of the fold is not what the log folds to.
    Checkpoint {
        /// Its position.
        position: Position,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { table, key } => write!(f, "{table}: {key} is missing"),
            Self::Surplus { table, key } => write!(f, "{table}: {key} should not be there"),
            Self::Content { table, key } => write!(f, "{table}: {key} is not what the log says"),
            Self::Hash { table, key } => write!(f, "{table}: the body of {key} does not have its hash"),
            Self::Epoch { stored, computed } => {
                write!(f, "weft.projection: the checkpoint says {stored}, the log {computed}")
            }
            Self::Checkpoint { position } => write!(
                f,
                "weft.fold_checkpoint: the one at {position} is not what the log says; delete it, nothing is lost with it"
            ),
        }
    }
}

/// What was compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowsReport {
    /// The checkpoint that the rows belong to.
    pub checkpoint: ConfigVersion,
    /// Rows that follow from the log.
    pub rows: usize,
    /// Hash of the newest manifests of all classes together: equal on two machines that folded the same log.
    pub manifests: Hash,
    /// Every difference, in the order of the tables; empty if the rows are right.
    pub differences: Vec<Difference>,
}

/// The rows could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyRowsError {
    /// The rows could not be read.
    #[error("the projection's rows could not be read")]
    Store(#[from] StoreError),
    /// The log could not be folded.
    #[error("the log could not be folded up to the rows' checkpoint")]
    Fold(#[from] FoldToError),
}

/// Folds the log from its first event to the stored checkpoint and compares. Needs no more rights than `weft_reader` has.
///
/// # Errors
/// If rows or log cannot be read; differences are no error.
pub async fn verify_rows(
    reader: &Reader,
    store: &Store,
    mut progress: impl FnMut(FoldProgress) + Send,
) -> Result<RowsReport, VerifyRowsError> {
    let (checkpoint, stored) = store.rows().await?;
    let wanted = checkpoint.position;
    let mut progress = |folded| progress(FoldProgress { folded, of: wanted });
    let mut on_the_way = store.fold_checkpoints().await?;
    on_the_way.retain(|stored| stored.version.position <= wanted);

    let mut replay = Replay::from(Projection::default());
    let mut differences = Vec::new();
    // The newest comes first.
    for stored in on_the_way.iter().rev() {
        let position = stored.version.position;
        replay.fold_to(reader, position, &mut progress).await.map_err(FoldToError::from)?;
        let projection = replay.finish();
        if !is_right(reader, store, stored, &projection).await? {
            differences.push(Difference::Checkpoint { position });
        }
        replay = Replay::from(projection);
    }
    replay.fold_to(reader, wanted, &mut progress).await.map_err(FoldToError::from)?;
    let head = replay.version().position;
    if head < wanted {
        return Err(FoldToError::NotYet { wanted, head }.into());
    }
    let mut report = compare(&replay.finish(), checkpoint, &stored);
    report.differences.extend(differences);
    Ok(report)
}

/// Whether a checkpoint is what the log folds to there. One of another version of the fold is not ours to judge, and one that
/// was removed in the meantime is none.
async fn is_right(
    reader: &Reader,
    store: &Store,
    stored: &StoredCheckpoint,
    projection: &Projection,
) -> Result<bool, VerifyRowsError> {
    match checkpoint::body(store, stored).await {
        Ok(checkpoint) => {
            let in_log = checkpoint::is_in_log(reader, stored).await.map_err(FoldToError::Store)?;
            Ok(in_log && checkpoint == Checkpoint::of(projection))
        }
        Err(Unusable::FoldVersion { .. } | Unusable::Removed) => Ok(true),
        Err(Unusable::Store(error)) => Err(error.into()),
        Err(Unusable::Log(error)) => Err(FoldToError::Store(error).into()),
        Err(
            Unusable::NotInLog
            | Unusable::Long(_)
            | Unusable::Hash
            | Unusable::Compression(_)
            | Unusable::Encoding(_)
            | Unusable::Version { .. }
            | Unusable::GivenUp,
        ) => Ok(false),
    }
}

fn compare(projection: &Projection, checkpoint: ConfigVersion, stored: &RowChanges) -> RowsReport {
    let computed = RowChanges::all(projection);
    let mut differences = Vec::new();
    if projection.version() != checkpoint {
        differences.push(Difference::Epoch { stored: checkpoint, computed: projection.version() });
    }
    differences.extend(tables(&computed, stored));
    for (key, row) in stored.shards.iter().filter_map(|(key, row)| Some((key, row.as_ref()?))) {
        if Hash::of(&row.body) != row.hash {
            differences.push(Difference::Hash { table: "weft.proxy_routing_state", key: key.clone() });
        }
    }
    let mut manifests = Vec::new();
    for class in projection.classes().values() {
        manifests.extend_from_slice(class.interest.to_string().as_bytes());
        manifests.extend_from_slice(&class.manifest.hash().0);
    }
    RowsReport { checkpoint, rows: computed.len(), manifests: Hash::of(&manifests), differences }
}

fn tables(computed: &RowChanges, stored: &RowChanges) -> Vec<Difference> {
    let mut differences = table("weft.proxy_routing_state", &computed.shards, &stored.shards);
    differences.extend(table("weft.interest_class", &computed.classes, &stored.classes));
    differences.extend(table("weft.class_manifest", &computed.manifests, &stored.manifests));
    differences.extend(table("weft.sidecar_class", &computed.sidecars, &stored.sidecars));
    differences.extend(table("weft.projected_service", &computed.services, &stored.services));
    differences.extend(table("weft.projected_instance", &computed.instances, &stored.instances));
    differences.extend(table("weft.projected_flapping", &computed.flapping, &stored.flapping));
    differences.extend(table("weft.projected_policy", &computed.policies, &stored.policies));
    differences
}

fn table<R: PartialEq>(table: &'static str, computed: &Table<R>, stored: &Table<R>) -> Vec<Difference> {
    let wrong = computed.iter().filter_map(|(key, row)| match stored.get(key) {
        None => Some(Difference::Missing { table, key: key.clone() }),
        Some(found) if found != row => Some(Difference::Content { table, key: key.clone() }),
        Some(_) => None,
    });
    let surplus = stored.keys().filter(|key| !computed.contains_key(*key));
    let surplus = surplus.map(|key| Difference::Surplus { table, key: key.clone() });
    wrong.chain(surplus).collect()
}
