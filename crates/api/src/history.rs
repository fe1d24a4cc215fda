//! Going on with a log that lost its end: an operator's decision, and the event that begins its epoch.
//!
//! The decision is a row beside the log ([`weft_eventlog::adopt`]), because it is taken while nothing can be appended. The event
//! [`HistoryAdopted`] follows it at once: it shows the decision to everybody who reads the log, and makes every sidecar's wanted
//! version one of the new epoch, newer than all that was lost (I4). Any controller whose fold continues may record it; its
//! command id follows from the decision, so it is there once.

use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};
use weft_eventlog::{Adopt, AdoptError, Adoption, AppendRequest, NewEvent, ScopeAppend, adopt};
use weft_model::mesh::{HistoryAdopted, MeshEvent};
use weft_model::version::ExpectedVersion;
use weft_model::{ConfigVersion, Event, Position, Scope};
use weft_proto::v1 as pb;

use crate::Context;
use crate::commands::FOLD_WAIT_MAX;
use crate::convert::{self, config_version};
use crate::status::ApiError;

/// Adopts the log as it is, in the name of `actor`.
pub(crate) async fn decide(
    context: &Context,
    actor: String,
    request: pb::AdoptHistoryRequest,
) -> Result<pb::AdoptHistoryResponse, ApiError> {
    let reason = convert::meta(request.meta)?.reason;
    let reason = reason.ok_or_else(|| {
        ApiError::invalid("meta.reason", "is missing: say why the lost events are given up")
    })?;
    let wanted = Adopt { rewind_upto: request.rewind_upto, actor, reason };
    let adoption = match adopt(&context.reader, &wanted).await {
        Ok(adoption) => adoption,
        // The answer to the first attempt was lost.
        Err(AdoptError::Settled { adoption })
            if adoption.actor == wanted.actor && adoption.reason == wanted.reason =>
        {
            *adoption
        }
        Err(AdoptError::Store(error)) => return Err(error.into()),
        Err(error) => return Err(ApiError::Rewound(error.to_string())),
    };
    let version = match record(context, &adoption).await {
        Ok(version) => version,
        Err(error) => {
            tracing::warn!(?error, "the adoption is no event of the log yet; a controller records it later");
            None
        }
    };
    Ok(pb::AdoptHistoryResponse {
        epoch: adoption.epoch.0,
        fork_position: adoption.fork_position.0,
        rewind_upto: adoption.rewind_upto,
        version: version.map(config_version),
    })
}

/// Makes a decision an event of the log, once. None if this controller's fold does not continue the log: another one does it.
///
/// # Errors
/// If the log does not take it now.
pub async fn record(context: &Context, adoption: &Adoption) -> Result<Option<ConfigVersion>, ApiError> {
    if context.view.fault().is_some() {
        return Ok(None);
    }
    let adopted = HistoryAdopted { epoch: adoption.epoch.0, fork_position: adoption.fork_position.0 };
    let event = Event::from(MeshEvent::from(adopted));
    let payload = event.payload().map_err(|error| ApiError::Internal(error.to_string()))?;
    let event = NewEvent { event_type: event.type_name().into(), schema: event.schema(), payload };
    let scope = Scope::Mesh.to_string();
    let request = AppendRequest {
        command_id: command_id(adoption),
        fingerprint: None,
        actor: adoption.actor.clone(),
        reason: Some(adoption.reason.clone()),
        cause: None,
        // It rests on nothing that the mesh's scope says.
        scopes: vec![ScopeAppend { scope, expected: ExpectedVersion::Any, events: vec![event] }],
    };
    let appended = context.appender.append(request).await?;
    let position = appended.positions.map_or(Position::ZERO, |positions| *positions.end());
    // Recorded either way; who reads here before the fold has it sees the older state.
    let _ = context.view.wait_folded(position, FOLD_WAIT_MAX).await;
    Ok(Some(ConfigVersion::new(appended.epoch, position)))
}

/// The same for everybody who records this decision.
fn command_id(adoption: &Adoption) -> Uuid {
    let named = format!("weft-adoption\n{}\n{}\n{}", adoption.id, adoption.epoch, adoption.adopted_at.0);
    let digest = Sha256::digest(named.as_bytes());
    let mut random = [0; 10];
    random.copy_from_slice(&digest[..10]);
    let millis = u64::try_from(adoption.adopted_at.millis()).unwrap_or(0);
    Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
}
