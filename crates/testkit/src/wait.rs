//! Waiting on conditions.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How often a condition is looked at. Only a test's length depends on it.
const POLL: Duration = Duration::from_millis(10);

/// Waits until `condition` holds, looking every 10 ms. `what` completes the sentence "waited for …".
///
/// ```
/// # use std::time::Duration;
/// # use weft_testkit::wait_until;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let mut looked = 0;
/// wait_until("a third look", Duration::from_secs(5), async || {
///     looked += 1;
///     looked == 3
/// })
/// .await;
/// # }
/// ```
///
/// # Panics
///
/// When the condition does not hold within `limit`, or does not answer by then.
pub async fn wait_until(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    let held = tokio::time::timeout(limit, async {
        while !condition().await {
            sleep(POLL).await;
        }
    });
    if held.await.is_err() {
        panic!("waited {:.1} s for {what}", start.elapsed().as_secs_f32());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "waited 3.0 s for the impossible")]
    async fn a_condition_that_never_holds_is_named() {
        wait_until("the impossible", Duration::from_secs(3), async || false).await;
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "waited 3.0 s for an answer")]
    async fn a_condition_that_never_answers_is_named() {
        wait_until("an answer", Duration::from_secs(3), async || std::future::pending().await).await;
    }
}
