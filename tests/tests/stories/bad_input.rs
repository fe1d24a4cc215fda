//! What is wrong is refused with a reason and a next step, and changes nothing.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use weft_tests::mesh::local;
use weft_tests::programs;
use weft_tests::up::Folder;
use weft_tests::wait::until;
use weft_tests::weft::{Said, Weft, program, run};

/// A file that is refused, and what the refusal says.
const FILES: &[(&str, &str, &[&str])] = &[
    ("malformed", "kind: Service\nname: [default/shop\n", &["malformed.yaml:", "weft check -f"]),
    (
        "unknown field",
        "kind: Service\nname: default/shop\nprots: [{ name: http, port: 80 }]\n",
        &["unknown field.yaml:3", "prots", "ports", "weft check -f"],
    ),
    (
        "unknown kind",
        "kind: Sevrice\nname: default/shop\n",
        &["unknown kind.yaml:1", "Service", "weft check -f"],
    ),
    (
        "wrong value",
        "kind: Service\nname: default/shop\nports: [{ name: http, port: 70000 }]\n",
        &["wrong value.yaml:3", "70000"],
    ),
    // The first document is right; all or nothing is applied.
    (
        "second of two",
        "kind: Service\nname: default/shop\nports: [{ name: http, port: 80 }]\n---\nkind: TrafficPolicy\nscope: default/shop\nbalance: fairest\n",
        &["second of two.yaml:7", "least_connections"],
    ),
    (
        "unknown service",
        "kind: Instance\nname: default/nowhere/one\naddress: 127.0.0.1:1\nupstreams: []\n",
        &["unknown service.yaml:", "default/nowhere", "nothing was changed"],
    ),
];

#[tokio::test]
async fn what_is_wrong_names_the_next_step_and_changes_nothing() -> anyhow::Result<()> {
    let folder = Folder::new()?;
    let mut up = folder.up().await?;
    let weft = folder.weft();
    let head = folder.log_head().await?;
    let unchanged = async |what: &str| {
        let now = folder.log_head().await?;
        ensure!(now == head, "{what}: the log was at {head}, and is at {now}");
        anyhow::Ok(())
    };

    for (name, text, says) in FILES {
        let file = folder.path().join(format!("{name}.yaml"));
        std::fs::write(&file, text)?;
        let said = weft.run([OsStr::new("apply"), OsStr::new("-f"), file.as_os_str()]).await?;
        refused(&said, 1, says)?;
        unchanged(name).await?;
    }

    for (args, status, says) in [
        (vec!["get", "service", "nowhere"], 1, "weft get services"),
        (vec!["describe", "service", "nowhere"], 1, "weft get services"),
        (vec!["why", "web", "nowhere:80"], 2, ""),
        (vec!["token", "create", "--service", "nowhere"], 1, "default/nowhere"),
        (vec!["delete", "service", "nowhere"], 1, "default/nowhere"),
        (vec!["sql", "delete from weft.event"], 1, "weft apply"),
        (vec!["sql", "select * from status.nothing"], 1, "pg_views"),
        (vec!["status", "--at", "99999"], 1, ""),
    ] {
        let said = weft.run(&args).await?;
        ensure!(said.status == Some(status), "not {status}: {said}");
        ensure!(said.stderr.contains(says), "{says:?} is not said: {said}");
        ensure!(!said.stdout.is_empty() || !said.stderr.is_empty(), "nothing is said: {said}");
        unchanged(&args.join(" ")).await?;
    }

    // A second mesh in the same folder, and one that wants the same ports.
    refused(&run(folder.up_command()).await?, 1, &["runs already", "weft down"])?;
    unchanged("a second up").await?;
    let mut elsewhere = program(weft.program());
    let other = folder.path().join("other");
    std::fs::create_dir(&other)?;
    elsewhere.args(["up", "--base-port", &folder.base_port().to_string()]).current_dir(&other);
    refused(&run(elsewhere).await?, 1, &[&folder.base_port().to_string(), "--base-port"])?;
    unchanged("a busy port").await?;
    up.footprint.look()?;
    ensure!(up.footprint.left()?.len() >= up.footprint.processes(), "the first mesh was harmed");

    // Nobody there, and no mesh known.
    refused(&absent_controller(&folder).await?, 1, &["127.0.0.1", "weft up"])?;
    let mut homeless = program(weft.program());
    homeless.arg("status").current_dir("/");
    refused(&run(homeless).await?, 1, &["weft up", "--context"])?;

    ensure!(up.end(Signal::SIGINT).await?.success(), "Ctrl-C is no fault");
    up.gone().await
}

/// A join token works once, for a while, and for what it was made for.
#[tokio::test]
async fn a_token_that_is_used_expired_or_foreign_is_refused() -> anyhow::Result<()> {
    let folder = Folder::new()?;
    let mut up = folder.up().await?;
    let weft = folder.weft();
    let proxy = programs::built()?.proxy;
    let try_join = async |instance: &str, token: &Path, state: &str| {
        let mut command = program(&proxy);
        command.args(["--controller", &local(folder.base_port()).to_string(), "--instance", instance]);
        command.arg("--join-token-file").arg(token).arg("--state-dir").arg(folder.path().join(state));
        command.args(["--inbound-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        run(command).await
    };
    let create = async |name: &str, ttl: &str| {
        let file = folder.path().join(name);
        let args = ["token", "create", "--service", "api", "--ttl", ttl, "--out"].map(OsStr::new);
        weft.ok(args.into_iter().chain([file.as_os_str()])).await?;
        anyhow::Ok(file)
    };

    let expired = create("expired", "1s").await?;
    let fresh = create("fresh", "10m").await?;
    let used = create("used", "10m").await?;
    use_up(&folder, &proxy, &used).await?;
    let garbled = folder.path().join("garbled");
    let text = std::fs::read_to_string(&fresh)?;
    std::fs::write(&garbled, text.trim_end().get(..60).context("a token is longer")?)?;

    let over = "select bool_and(recorded_at < now() - interval '1 second') as over from audit.events";
    until("the token to expire", Duration::from_secs(10), async || {
        let rows = weft.json(&["sql", over]).await?;
        ensure!(rows[0]["over"] == true, "{rows}");
        Ok(())
    })
    .await?;
    let members = "select count(*) as members from status.endpoints";
    let before = (folder.log_head().await?, weft.json(&["sql", members]).await?);
    for (instance, token, says) in [
        ("default/api/late", &expired, "expired"),
        ("default/api/second", &used, "used"),
        ("default/db/other", &fresh, "not for default/db/other"),
        ("default/api/garbled", &garbled, "token"),
    ] {
        let said = try_join(instance, token, "state").await?;
        refused(&said, 1, &[says]).with_context(|| instance.to_owned())?;
        if token != &garbled {
            refused(&said, 1, &["weft token create --service default/"])?;
        }
        ensure!(!folder.path().join("state/identity").exists(), "{instance} got an identity");
        let after = (folder.log_head().await?, weft.json(&["sql", members]).await?);
        ensure!(after == before, "{instance}: {after:?} was {before:?}");
    }

    ensure!(up.end(Signal::SIGINT).await?.success(), "Ctrl-C is no fault");
    up.gone().await
}

/// Joins once with a token, and leaves.
async fn use_up(folder: &Folder, proxy: &Path, token: &Path) -> anyhow::Result<()> {
    let state = folder.path().join("joined");
    let mut command = program(proxy);
    command.args(["--controller", &local(folder.base_port()).to_string(), "--instance", "default/api/first"]);
    command.arg("--join-token-file").arg(token).arg("--state-dir").arg(&state);
    command.args(["--inbound-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    command.arg("--connection-log").arg(folder.path().join("joined.jsonl"));
    command.stderr(std::fs::File::create(folder.path().join("joined.log"))?);
    let mut joined = command.kill_on_drop(true).spawn()?;
    let weft = folder.weft();
    // Registered and running what it should: nothing of it comes into the log any more.
    let here =
        "select applied from status.sidecars where instance = 'default/api/first' and applied = wanted";
    let registered = until("the sidecar to join", Duration::from_secs(20), async || {
        let rows = weft.json(&["sql", here]).await?;
        ensure!(rows.as_array().is_some_and(|rows| rows.len() == 1), "{rows}");
        Ok(())
    });
    registered.await?;
    joined.kill().await?;
    Ok(())
}

/// Asks a controller at a port where nobody listens.
async fn absent_controller(folder: &Folder) -> anyhow::Result<Said> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let nobody = listener.local_addr()?;
    drop(listener);
    let context = folder.home().dir().join("absent.json");
    let text = std::fs::read_to_string(folder.home().context())?;
    std::fs::write(&context, text.replace(&local(folder.base_port()).to_string(), &nobody.to_string()))?;
    Weft::new(folder.weft().program(), context).run(["status"]).await
}

/// Whether a command was refused with this exit status, and said all of this.
fn refused(said: &Said, status: i32, says: &[&str]) -> anyhow::Result<()> {
    ensure!(said.status == Some(status), "not refused with {status}: {said}");
    for word in says {
        ensure!(said.stderr.contains(word), "{word:?} is not said: {said}");
    }
    ensure!(!said.stderr.contains("panicked"), "{said}");
    Ok(())
}
