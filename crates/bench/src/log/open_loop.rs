//! An open loop: requests that are due at fixed times, whether or not earlier ones are answered.
//!
//! A request's latency counts from when it was due. So a store that stands still is charged for all that came due
//! meanwhile, and not for one request only (the fault that is called coordinated omission).

use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::closed_loop::Times;
use crate::fleet::Fleet;
use crate::store::Log;

/// Latencies, the shortest first.
#[derive(Debug)]
pub(crate) struct Latencies(Vec<Duration>);

impl Latencies {
    /// The latency that so large a part of the requests did not exceed.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a length is between zero and the length"
    )]
    pub(crate) fn at(&self, quantile: f64) -> Duration {
        let rank = (quantile * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).copied().unwrap_or_default()
    }
}

/// Sends `rate` requests per second of one event each, and says how long those took that were due after the warm-up. A
/// scope comes again only after thousands of requests, so its last one is answered by then, or queued before it.
pub(crate) async fn open_loop(
    store: &Log,
    fleet: &mut Fleet,
    rate: u32,
    times: Times,
) -> anyhow::Result<Latencies> {
    let every = Duration::from_secs(1) / rate;
    let count = |time: Duration| usize::try_from(time.as_nanos() / every.as_nanos());
    let (skipped, measured) = (count(times.warm_up)?, count(times.measure)?);
    // Room for all: whoever gives the beat never waits.
    let (beat, mut due) = mpsc::channel(skipped + measured);
    let begin = Instant::now() + every;
    let drummer = thread::spawn(move || drum(begin, every, skipped + measured, &beat));

    let mut under_way = JoinSet::new();
    let mut latencies = Vec::with_capacity(measured);
    let (mut sent, mut lane) = (0, 0);
    while let Some(due) = due.recv().await {
        lane = (lane + 1) % fleet.len();
        let request = fleet[lane].report()?.into_request();
        let store = store.clone();
        let counts = sent >= skipped;
        sent += 1;
        under_way.spawn(async move {
            store.append(request).await?;
            anyhow::Ok(counts.then(|| due.elapsed()))
        });
        while let Some(ended) = under_way.try_join_next() {
            latencies.extend(ended.context("a request ended")??);
        }
    }
    while let Some(ended) = under_way.join_next().await {
        latencies.extend(ended.context("a request ended")??);
    }
    drummer.join().map_err(|_| anyhow::anyhow!("the beat ended"))?;
    latencies.sort_unstable();
    Ok(Latencies(latencies))
}

/// Tells each due time when it has come. A thread of its own, since the runtime's timer knows milliseconds only.
fn drum(begin: Instant, every: Duration, count: usize, beat: &mpsc::Sender<Instant>) {
    let mut due = begin;
    for _ in 0..count {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if beat.try_send(due).is_err() {
            return;
        }
        due += every;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_latency_that_occurred() {
        let latencies = Latencies((1..=200).map(Duration::from_millis).collect());
        for (quantile, ms) in [(0.0, 1), (0.5, 100), (0.99, 198), (0.999, 200), (1.0, 200)] {
            assert_eq!(latencies.at(quantile), Duration::from_millis(ms), "{quantile}");
        }
        assert_eq!(Latencies(Vec::new()).at(0.5), Duration::ZERO);
    }
}
