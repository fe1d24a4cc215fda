//! Repeating calls that nobody answered.

use crate::error::CallError;
use backon::{ExponentialBuilder, Retryable};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tonic::{Response, Status};
use uuid::Uuid;
use weft_proto::v1::CommandMeta;

/// Waits between attempts, with jitter: 50 ms doubling to 1 s. A controller that restarts is back within that.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
const RETRIES_MAX: usize = 6;
/// All attempts and waits together: one that is gone, or hangs, shall not keep a person waiting longer.
const DEADLINE: Duration = Duration::from_secs(15);

/// A new command's id and reason. Keep it for all repeats of the command.
#[must_use]
pub fn command(reason: impl Into<String>) -> CommandMeta {
    CommandMeta { command_id: Uuid::now_v7().to_string(), reason: reason.into() }
}

/// Calls until somebody answers, within a bound. The call must be safe to repeat: a read, or a command that keeps its
/// id.
///
/// # Errors
/// The last failure; where the time is over during a later call, that of the call before, which says more.
pub async fn retry<T, F, Fut>(call: F) -> Result<T, CallError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Response<T>, Status>>,
{
    let waits = ExponentialBuilder::default()
        .with_min_delay(FIRST_WAIT)
        .with_max_delay(LONGEST_WAIT)
        .with_max_times(RETRIES_MAX)
        .with_jitter();
    let mut call = call;
    let attempt = || {
        let answer = call();
        async { answer.await.map(Response::into_inner).map_err(CallError::from) }
    };
    let last = Mutex::new(None);
    let attempts = attempt.retry(waits).when(CallError::is_transient).notify(|error: &CallError, wait| {
        tracing::debug!(%error, ?wait, "no answer, calling again");
        *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
    });
    let in_time = tokio::time::timeout(DEADLINE, attempts).await;
    in_time.unwrap_or_else(|_| {
        let last = last.lock().unwrap_or_else(PoisonError::into_inner).take();
        Err(last.unwrap_or_else(|| CallError::Unreachable(format!("nothing came within {DEADLINE:?}"))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_may_pass_is_repeated_and_not_for_ever() {
        let mut calls = 0;
        let result: Result<(), _> = retry(|| {
            calls += 1;
            async { Err(Status::unavailable("away")) }
        })
        .await;
        assert!(matches!(result, Err(CallError::Unavailable(_))));
        assert_eq!(calls, RETRIES_MAX + 1);

        let mut calls = 0;
        let result: Result<(), _> = retry(|| {
            calls += 1;
            async { Err(Status::permission_denied("no")) }
        })
        .await;
        assert!(matches!(result, Err(CallError::Denied(_))));
        assert_eq!(calls, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_said_before_the_time_was_over_is_told() {
        let mut calls = 0;
        let result: Result<(), _> = retry(|| {
            calls += 1;
            let answers = calls == 1;
            async move {
                if !answers {
                    std::future::pending::<()>().await;
                }
                Err(Status::unavailable("the database is away"))
            }
        })
        .await;
        assert!(matches!(result, Err(CallError::Unavailable(why)) if why == "the database is away"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_taken() {
        let mut calls = 0;
        let result = retry(|| {
            calls += 1;
            let answer = if calls < 3 { Err(Status::unavailable("away")) } else { Ok(Response::new(calls)) };
            async { answer }
        })
        .await;
        assert_eq!(result.unwrap(), 3);
    }
}
