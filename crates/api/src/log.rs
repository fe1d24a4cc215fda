//! ReadLog: the events as they are, filtered, a page at a time, and if wanted those to come.
//!
//! A stream holds one page at most. It reads only when the client takes what it was sent, and ends with the client. One
//! that follows ends with the client's leaf, too, and says so.

use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use weft_eventlog::{Reader, RecordedEvent, Tail};
use weft_model::Position;
use weft_proto::v1 as pb;

use crate::caller::LEAF_ENDED;
use crate::convert::log_event;
use crate::status::ApiError;

/// Most events of `last`, because they are collected before they are sent.
const LAST_MAX: u64 = 10_000;
/// Events that are looked through at once when the last ones are wanted, going back from the end.
const WINDOW: u64 = 4_096;
/// Longest filter text.
const FILTER_BYTES_MAX: usize = 512;

type Batches = BoxStream<'static, Result<pb::LogBatch, Status>>;

/// What of the log is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    scope_prefix: String,
    event_type: String,
    actor: String,
}

impl Filter {
    pub(crate) fn new(request: &pb::ReadLogRequest) -> Result<Self, ApiError> {
        let texts =
            [("scope_prefix", &request.scope_prefix), ("type", &request.r#type), ("actor", &request.actor)];
        for (field, text) in texts {
            if text.len() > FILTER_BYTES_MAX {
                return Err(ApiError::invalid(field, format!("at most {FILTER_BYTES_MAX} bytes")));
            }
        }
        if request.last && request.limit > LAST_MAX {
            return Err(ApiError::invalid("limit", format!("at most {LAST_MAX} with last")));
        }
        if request.last && request.limit == 0 {
            return Err(ApiError::invalid("limit", "how many of the last events?"));
        }
        Ok(Self {
            scope_prefix: request.scope_prefix.clone(),
            event_type: request.r#type.clone(),
            actor: request.actor.clone(),
        })
    }

    fn admits(&self, event: &RecordedEvent) -> bool {
        event.scope.starts_with(&self.scope_prefix)
            && (self.event_type.is_empty() || event.event_type == self.event_type)
            && event.actor.contains(&self.actor)
    }
}

/// The matching events after `after` up to `to`, then, if `follow`, those to come: until `drain`, or the moment when the
/// caller's leaf ends.
pub(crate) async fn read(
    reader: Reader,
    filter: Filter,
    request: &pb::ReadLogRequest,
    to: Option<Position>,
    (drain, ends): (CancellationToken, Instant),
) -> Result<Batches, ApiError> {
    let head = reader.head().await?.position;
    let end = to.unwrap_or(head).min(head);
    let filter = Arc::new(filter);
    let after = Position(request.after);
    let past: BoxStream<'static, Result<Vec<RecordedEvent>, ApiError>> = if request.last {
        let last = last(&reader, &filter, after, end, request.limit).await?;
        stream::once(async move { Ok(last) }).boxed()
    } else {
        reader.stream(after, end).map_err(ApiError::from).boxed()
    };
    // An end that was asked for leaves nothing to follow.
    let follow = request.follow && to.is_none();
    let events = if follow {
        let tail = reader.tail(after.max(end));
        let to_come = stream::try_unfold(tail, move |mut tail: Tail| async move {
            tokio::select! {
                biased;
                () = sleep_until(ends) => Err(ApiError::Unauthenticated(LEAF_ENDED.into())),
                page = tail.next() => Ok(Some((page?, tail))),
            }
        });
        past.chain(to_come).take_until(drain.cancelled_owned()).boxed()
    } else {
        past
    };
    let limit = if request.limit == 0 { u64::MAX } else { request.limit };
    let start = (events, filter, limit);
    let batches = stream::try_unfold(start, |(mut events, filter, left)| async move {
        loop {
            if left == 0 {
                return Ok(None);
            }
            let Some(page) = events.try_next().await? else { return Ok(None) };
            let matching = page.into_iter().filter(|event| filter.admits(event));
            let taken: Vec<_> =
                matching.take(usize::try_from(left).unwrap_or(usize::MAX)).map(log_event).collect();
            if !taken.is_empty() {
                let left = left - taken.len() as u64;
                return Ok(Some((pb::LogBatch { events: taken }, (events, filter, left))));
            }
        }
    });
    Ok(batches.map_err(|error: ApiError| Status::from(error)).boxed())
}

/// The last `count` matching events, in order, found by going back a window at a time.
async fn last(
    reader: &Reader,
    filter: &Filter,
    after: Position,
    end: Position,
    count: u64,
) -> Result<Vec<RecordedEvent>, ApiError> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let mut found: VecDeque<RecordedEvent> = VecDeque::new();
    let mut to = end;
    while to > after && found.len() < count {
        let from = Position(to.0.saturating_sub(WINDOW)).max(after);
        let mut window = Vec::new();
        let mut pages = pin!(reader.stream(from, to));
        while let Some(page) = pages.try_next().await? {
            window.extend(page.into_iter().filter(|event| filter.admits(event)));
        }
        for event in window.into_iter().rev().take(count - found.len()) {
            found.push_front(event);
        }
        to = from;
    }
    Ok(found.into())
}
