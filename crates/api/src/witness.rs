//! What sidecars have seen of the log, as a witness against its loss.
//!
//! A restored backup or a failover loses the end of the log together with every table beside it, so only memory outside the
//! database can tell. With each notice a sidecar is given the newest published event, signed by the mesh's authority; it keeps
//! that on disk and shows it when it subscribes. A controller that is shown one checks the signature, then the log: the event
//! must be there with that hash. If it is not, that is recorded and stops every append in the mesh
//! ([`report_rewind`](weft_eventlog::report_rewind)).
//!
//! Invariants: only what a controller signed counts, so no sidecar stops the mesh by a lie; what is signed was committed by a
//! projector before. A fleet that comes back with the same witness costs one look at the log, and one that is refused a
//! query each, one at a time.
//!
//! Called by [`discovery`](crate::discovery) and by the controller, which keeps the newest one for its own next start.

use bytes::Bytes;
use prost::Message;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use weft_eventlog::{EventHash, Point, Reader, Reported, Seen, report_rewind};
use weft_identity::ca::CertificateAuthority;
use weft_identity::ca::witness::signed_by;
use weft_model::{Chain, Epoch, Position};
use weft_projector::View;
use weft_proto::v1 as pb;

use crate::status::ApiError;

/// Longest witness that is looked at: two numbers, a hash and a signature are some 130 bytes.
pub const WITNESS_BYTES_MAX: usize = 512;
/// Names of callers with a bad witness that are remembered, so that each is logged once. When there are more, something else
/// is wrong, and the counter tells.
const WARNED_MAX: usize = 256;

/// See the module's documentation.
#[derive(Debug)]
pub struct Witnesses {
    view: View,
    reader: Reader,
    authority: Arc<CertificateAuthority>,
    /// The last one that was made: one signature per publication, however many are told.
    newest: Mutex<Option<(Point, Bytes)>>,
    /// The last one that was shown and found in the log.
    verified: Mutex<Option<(Bytes, Point)>>,
    /// Held while a loss is recorded: the next one then finds it recorded.
    reporting: tokio::sync::Mutex<()>,
    warned: Mutex<BTreeSet<String>>,
}

impl Witnesses {
    /// Witnesses that this authority signs.
    #[must_use]
    pub fn new(view: View, reader: Reader, authority: Arc<CertificateAuthority>) -> Self {
        Self {
            view,
            reader,
            authority,
            newest: Mutex::default(),
            verified: Mutex::default(),
            reporting: tokio::sync::Mutex::default(),
            warned: Mutex::default(),
        }
    }

    /// The newest published event, signed; none before the first one.
    #[must_use]
    pub fn newest(&self) -> Option<Bytes> {
        self.sign(self.view.published(weft_projector::Published::point)?)
    }

    /// A published event, signed.
    pub(crate) fn sign(&self, point: Point) -> Option<Bytes> {
        let mut newest = lock(&self.newest);
        if let Some((signed, witness)) = &*newest
            && *signed == point
        {
            return Some(witness.clone());
        }
        let message = pb::LogPoint {
            epoch: point.epoch.0,
            position: point.position.0,
            hash: point.hash.0.to_vec().into(),
        };
        let statement = message.encode_to_vec();
        match self.authority.sign_witness(&statement) {
            Ok(signature) => {
                let witness = pb::LogWitness { point: statement.into(), signature: signature.into() };
                let witness = Bytes::from(witness.encode_to_vec());
                *newest = Some((point, witness.clone()));
                Some(witness)
            }
            Err(error) => {
                tracing::error!(error = %Chain(&error), "no witness can be signed; sidecars are told none");
                None
            }
        }
    }

    /// Checks what a caller has seen. One that the mesh's authority did not sign says nothing.
    ///
    /// # Errors
    /// [`ApiError::Rewound`] if the log does not have it, which is recorded then.
    pub async fn check(&self, witness: &Bytes, who: &str) -> Result<(), ApiError> {
        if witness.is_empty() || self.is_verified(|verified, _| verified == witness) {
            return Ok(());
        }
        let Some(point) = self.believe(witness) else {
            metrics::counter!("weft_api_witness_refused_total").increment(1);
            self.warn_once(who);
            return Ok(());
        };
        if self.is_verified(|_, verified| *verified == point) {
            return Ok(());
        }
        match self.reader.check_seen(&point).await? {
            Seen::Stands => {
                *lock(&self.verified) = Some((witness.clone(), point));
                Ok(())
            }
            Seen::NotYet | Seen::GivenUp => Ok(()),
            Seen::Lost { .. } => self.report(&point, who).await,
        }
    }

    async fn report(&self, point: &Point, who: &str) -> Result<(), ApiError> {
        let _one_at_a_time = self.reporting.lock().await;
        metrics::counter!("weft_api_log_rewound_total").increment(1);
        match report_rewind(&self.reader, point, who).await? {
            // Another controller's append was faster than this one's look, or somebody decided meanwhile.
            Reported::Stands | Reported::NotYet | Reported::GivenUp => Ok(()),
            Reported::Known | Reported::Recorded => Err(ApiError::Rewound(format!(
                "LOG_REWOUND: event {} was seen and is not in the log; nothing is appended until an operator restores \
                     what was lost or runs `weft log adopt-history`",
                point.version()
            ))),
        }
    }

    /// Whether the last one that was found in the log is this one. A controller whose own fold does not continue trusts
    /// nothing that it found earlier.
    fn is_verified(&self, same: impl FnOnce(&Bytes, &Point) -> bool) -> bool {
        self.view.fault().is_none()
            && lock(&self.verified).as_ref().is_some_and(|(bytes, point)| same(bytes, point))
    }

    /// What a witness says, if this authority signed it, or another one that the mesh trusts.
    fn believe(&self, witness: &[u8]) -> Option<Point> {
        if witness.len() > WITNESS_BYTES_MAX {
            return None;
        }
        let pb::LogWitness { point: statement, signature } = pb::LogWitness::decode(witness).ok()?;
        if !signed_by(self.authority.root(), &statement, &signature) && !self.trusted(&statement, &signature)
        {
            return None;
        }
        let pb::LogPoint { epoch, position, hash } = pb::LogPoint::decode(&*statement).ok()?;
        let hash = EventHash(hash.as_ref().try_into().ok()?);
        let number = |number: u64| i64::try_from(number).ok().map(i64::cast_unsigned);
        let position = number(position).filter(|position| *position > 0)?;
        Some(Point { epoch: Epoch(number(epoch)?), position: Position(position), hash })
    }

    fn trusted(&self, statement: &[u8], signature: &[u8]) -> bool {
        self.view.read(|projection| {
            projection.state().ca().state.iter().any(|root| {
                let root = CertificateDer::from_pem_slice(root.certificate_pem.as_bytes());
                root.is_ok_and(|root| signed_by(&root, statement, signature))
            })
        })
    }

    fn warn_once(&self, who: &str) {
        let mut warned = lock(&self.warned);
        if warned.len() < WARNED_MAX && warned.insert(who.to_owned()) {
            tracing::warn!(who, "a witness of the log that this mesh's authority did not sign is ignored");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
