//! Waiting on conditions, with an error that says what was seen last.

use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::time::{Instant, sleep, timeout};

/// How often a condition is looked at. Only the length of a run depends on it.
const POLL: Duration = Duration::from_millis(10);

/// Looks until `look` succeeds, and returns what it found. `what` completes the sentence "waited for …"; the last
/// refusal of `look` is the cause of the error.
///
/// # Errors
///
/// `look` does not succeed within `limit`.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    let mut last = anyhow!("it gave no answer");
    let found = timeout(limit, async {
        loop {
            match look().await {
                Ok(found) => return found,
                Err(why) => last = why,
            }
            sleep(POLL).await;
        }
    })
    .await;
    match found {
        Ok(found) => Ok(found),
        Err(_) => {
            Err(last).with_context(|| format!("waited {:.1} s for {what}", start.elapsed().as_secs_f32()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_seen_last_is_told() {
        let mut looks = 0;
        let never: anyhow::Result<()> = until("the impossible", Duration::from_secs(3), async || {
            looks += 1;
            Err(anyhow!("look {looks} saw nothing"))
        })
        .await;
        let told = format!("{:#}", never.unwrap_err());
        assert_eq!(told, format!("waited 3.0 s for the impossible: look {looks} saw nothing"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_answers_is_given_up() {
        let never: anyhow::Result<()> =
            until("an answer", Duration::from_secs(3), async || std::future::pending().await).await;
        assert!(never.is_err());
    }
}
