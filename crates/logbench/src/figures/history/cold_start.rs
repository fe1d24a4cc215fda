//! How long a controller takes from its start until it serves.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use weft_pgserver::reserve_loopback_port;

use crate::figures::median;
use crate::server::Database;
use crate::{Bench, say};

/// Pause between two questions whether it is ready: the error of the figure.
const POLL: Duration = Duration::from_millis(2);
/// A controller that folds ten million events without a checkpoint is ready by then.
const READY_MAX: Duration = Duration::from_secs(300);
/// A checkpoint that is not there by then is not coming soon: the next start folds everything, and the figure says so.
const CHECKPOINT_MAX: Duration = Duration::from_secs(60);
/// It ends within its own limits, which are shorter.
const END_MAX: Duration = Duration::from_secs(30);

/// Starts a controller on the log once, so that it projects everything and leaves a checkpoint of its fold where it keeps
/// them; then measures further starts.
pub(super) async fn cold_start(bench: &mut Bench, database: &Database) -> anyhow::Result<()> {
    anyhow::ensure!(
        bench.controller.is_file(),
        "there is no controller at {}; build it beside this program, or say where it is with --controller",
        bench.controller.display()
    );
    let state = tempfile::tempdir()?;
    let url = database.url(&bench.url)?;
    let (first, controller) = start(&bench.controller, state.path(), &url).await?;
    projected(database).await?;
    if let Some(position) = checkpointed(database).await? {
        bench.report.set("cold_start_checkpoint", position);
    }
    end(controller).await?;
    let mut starts = Vec::new();
    for _ in 0..bench.plan.rounds {
        let (seconds, controller) = start(&bench.controller, state.path(), &url).await?;
        say(&format!(
            "a controller serves {seconds:.3} s after its start; the first time it was {first:.3} s"
        ));
        starts.push(seconds);
        end(controller).await?;
    }
    bench.report.set("first_start_1m_s", first);
    bench.report.set("cold_start_1m_s", median(&mut starts));
    Ok(())
}

/// Starts a controller and waits until it is ready; says how long that took.
async fn start(program: &Path, state: &Path, url: &str) -> anyhow::Result<(f64, Child)> {
    let (listen, admin) = (reserve_loopback_port()?, reserve_loopback_port()?);
    let log = std::fs::File::create(state.join("controller.log"))?;
    let begun = Instant::now();
    let mut controller = Command::new(program)
        .env("WEFT_DATABASE_URL", url)
        .env("WEFT_LISTEN", format!("127.0.0.1:{listen}"))
        .env("WEFT_ADMIN_LISTEN", format!("127.0.0.1:{admin}"))
        .env("WEFT_STATE_DIR", state)
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{} could not be run", program.display()))?;
    while !ready(admin).await {
        let said = || std::fs::read_to_string(state.join("controller.log")).unwrap_or_default();
        if let Some(status) = controller.try_wait()? {
            anyhow::bail!("the controller ended ({status}); it said:\n{}", said());
        }
        anyhow::ensure!(
            begun.elapsed() < READY_MAX,
            "the controller did not become ready; it said:\n{}",
            said()
        );
        sleep(POLL).await;
    }
    Ok((begun.elapsed().as_secs_f64(), controller))
}

/// Whether `/ready` says so.
async fn ready(port: u16) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(b"GET /ready HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    matches!(timeout(Duration::from_secs(1), asked).await, Ok(Ok(answer)) if answer.split(' ').nth(1) == Some("200"))
}

/// Waits until the projector's rows stand for the whole log.
async fn projected(database: &Database) -> anyhow::Result<()> {
    const SQL: &str = "select (select max(last_position) from weft.log_batch) - \
                       (select coalesce(max(position), 0) from weft.projection)";
    let begun = Instant::now();
    while database.number(SQL).await? > 0 {
        anyhow::ensure!(begun.elapsed() < READY_MAX, "the controller did not project the log");
        sleep(POLL * 50).await;
    }
    Ok(())
}

/// Waits until a checkpoint of the fold is stored, and says of which position. None if this schema has no place for them.
async fn checkpointed(database: &Database) -> anyhow::Result<Option<i64>> {
    const PLACE_SQL: &str = "select count(to_regclass('weft.fold_checkpoint'))";
    const SQL: &str = "select coalesce(max(position), 0) from weft.fold_checkpoint";
    if database.number(PLACE_SQL).await? == 0 {
        return Ok(None);
    }
    let begun = Instant::now();
    loop {
        let position = database.number(SQL).await?;
        if position > 0 || begun.elapsed() > CHECKPOINT_MAX {
            return Ok(Some(position));
        }
        sleep(POLL * 50).await;
    }
}

/// Ends a controller as an operator does.
async fn end(mut controller: Child) -> anyhow::Result<()> {
    let process = controller.id().context("the controller ended by itself")?;
    kill(Pid::from_raw(process.cast_signed()), Signal::SIGTERM)?;
    let ended = timeout(END_MAX, controller.wait()).await.context("the controller did not end")?;
    anyhow::ensure!(ended?.success(), "the controller failed as it ended");
    Ok(())
}
