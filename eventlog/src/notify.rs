//! Hints between processes that share a log: "there are events up to here".
//!
//! Sent on connections of their own, outside the append transaction, because a transaction that notifies takes a lock
//! of the whole database server at commit. Everybody who may connect may also send hints, so they are never believed
//! beyond being a reason to look.

use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;
use weft_model::version::Position;

use crate::session::{Duty, Session, StoreError};
use weft_model::Chain;

/// The channel of `LISTEN` and `NOTIFY`.
const CHANNEL: &str = "weft_log";
/// Pause between two hints: appends in between share one.
const COALESCE: Duration = Duration::from_millis(5);
/// Pause before a lost connection is made again; polling carries on meanwhile.
const RECONNECT: Duration = Duration::from_secs(1);

/// Tells other processes what this one committed, until `closing`.
pub(crate) async fn announce(
    config: Config,
    mut committed: watch::Receiver<Position>,
    closing: CancellationToken,
) {
    let work = async {
        let mut session = None;
        while committed.changed().await.is_ok() {
            let position = *committed.borrow_and_update();
            match send(&config, session.take(), position).await {
                Ok(alive) => {
                    session = Some(alive);
                    sleep(COALESCE).await;
                }
                Err(error) => {
                    tracing::debug!(error = %Chain(&error), "hint not sent; other nodes find the events by polling");
                    sleep(RECONNECT).await;
                }
            }
        }
    };
    closing.run_until_cancelled(work).await;
}

async fn send(config: &Config, session: Option<Session>, position: Position) -> Result<Session, StoreError> {
    let session = match session {
        Some(session) if !session.client.is_closed() => session,
        _ => Session::open(config, Duty::Append).await?,
    };
    let sent = session.client.query("select pg_notify($1, $2)", &[&CHANNEL, &position.to_string()]).await;
    sent.map_err(StoreError::while_doing("notify readers"))?;
    Ok(session)
}

/// Passes other processes' hints on to `wake`, for as long as it is polled.
pub(crate) async fn listen(config: Config, wake: watch::Sender<Position>) {
    loop {
        if let Err(error) = listen_once(&config, &wake).await {
            tracing::debug!(error = %Chain(&error), "hints not heard; new events are found by polling");
        }
        sleep(RECONNECT).await;
    }
}

async fn listen_once(config: &Config, wake: &watch::Sender<Position>) -> Result<(), StoreError> {
    let heard = wake.clone();
    let mut session = Session::open_with(config, Duty::Read, move |notification| {
        hear(notification.channel(), notification.payload(), &heard);
    })
    .await?;
    let listening = session.client.batch_execute(&format!("listen {CHANNEL}")).await;
    listening.map_err(StoreError::while_doing("listen for hints"))?;
    // What was committed while nobody listened is news too.
    wake.send_modify(|_| ());
    session.closed().await;
    Ok(())
}

/// Any other position than the last one heard of is a reason to look, also a smaller one: the log may have become
/// shorter, or the larger one may have been a lie. Our own appends come back as hints; they are not news.
fn hear(channel: &str, payload: &str, wake: &watch::Sender<Position>) {
    if channel != CHANNEL {
        return;
    }
    let Ok(position) = payload.parse().map(Position) else { return };
    wake.send_if_modified(|known| std::mem::replace(known, position) != position);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hint_but_a_repetition_wakes_whatever_was_said_before() {
        let wake = watch::Sender::new(Position(7));
        let mut listener = wake.subscribe();
        let mut wakes = |channel, payload| {
            listener.mark_unchanged();
            hear(channel, payload, &wake);
            listener.has_changed().unwrap()
        };
        assert!(!wakes(CHANNEL, "7"), "our own append");
        assert!(wakes(CHANNEL, "8"));
        assert!(wakes(CHANNEL, "18446744073709551615"), "a lie");
        assert!(wakes(CHANNEL, "9"), "the truth after a lie");
        assert!(wakes(CHANNEL, "3"), "a log that became shorter");
        assert!(!wakes("another", "10"));
        assert!(!wakes(CHANNEL, "-1") && !wakes(CHANNEL, "x") && !wakes(CHANNEL, ""));
    }
}
