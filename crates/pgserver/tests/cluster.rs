//! What a private server must bear: restarts, crashes of either side, folders that do not suit, and a second owner.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use postgres::{Client, NoTls};
use tempfile::TempDir;
use weft_pgserver::{Binaries, Cluster, ClusterConfig, OpenError, Server, StartError};

/// A folder that the server's account can enter whatever the umask.
fn passable_dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).unwrap();
    dir
}

fn open(config: ClusterConfig) -> Result<Cluster, OpenError> {
    Cluster::open(Binaries::find().unwrap(), config, &mut |_| {})
}

fn start(dir: &Path) -> Server {
    open(ClusterConfig::new(dir)).unwrap().start(&mut |_| {}).unwrap()
}

fn connect(server: &Server) -> Client {
    Client::connect(&server.url("postgres"), NoTls).unwrap()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..1_500 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("waited 30 s for {what}");
}

#[test]
fn what_was_written_is_there_after_stop_and_start_and_after_a_crash() {
    let dir = passable_dir();
    let server = start(dir.path());
    let settings = "SELECT current_setting('fsync'), current_setting('data_checksums'), current_setting('server_encoding')";
    let row = connect(&server).query_one(settings, &[]).unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), ("on", "on", "UTF8"));
    connect(&server).batch_execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)").unwrap();
    let cluster = server.stop().unwrap();
    assert!(!cluster.data_dir().join("postmaster.pid").exists());

    let mut server = cluster.start(&mut |_| {}).unwrap();
    connect(&server).batch_execute("INSERT INTO kept VALUES (2)").unwrap();
    kill(Pid::from_raw(server.pid().cast_signed()), Signal::SIGKILL).unwrap();
    wait_until("the killed server to be seen", || server.exited().unwrap().is_some());
    drop(server);

    let server = start(dir.path());
    assert_eq!(connect(&server).query_one("SELECT sum(n) FROM kept", &[]).unwrap().get::<_, i64>(0), 3);
}

#[test]
fn the_password_is_needed_and_the_files_are_private() {
    let dir = passable_dir();
    let server = start(dir.path());
    let wrong = format!("postgres://weft:wrong@127.0.0.1:{}/postgres", server.port());
    assert!(Client::connect(&wrong, NoTls).is_err());
    let socket =
        format!("host={} port={} user=weft dbname=postgres", server.socket_dir().display(), server.port());
    assert!(Client::connect(&socket, NoTls).is_err());
    let password = fs::read_to_string(server.cluster().password_file()).unwrap();
    Client::connect(&format!("{socket} password={}", password.trim()), NoTls).unwrap();

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&server.cluster().password_file()), 0o600);
    assert_eq!(mode(&server.cluster().data_dir()), 0o700);
    assert_eq!(mode(server.socket_dir()), 0o700);
}

#[test]
fn the_password_is_never_printed() {
    let dir = passable_dir();
    let server = start(dir.path());
    let password = fs::read_to_string(server.cluster().password_file()).unwrap();
    let shown = format!("{server:?} {:?}", server.cluster());
    assert!(shown.contains(&dir.path().display().to_string()) && !shown.contains(password.trim()), "{shown}");
}

#[test]
fn a_second_owner_is_refused_and_told_who_the_first_is() {
    let dir = passable_dir();
    let _first = open(ClusterConfig::new(dir.path())).unwrap();
    let refused = open(ClusterConfig::new(dir.path())).unwrap_err();
    let ours = std::process::id().to_string();
    assert!(matches!(&refused, OpenError::InUse { holder, .. } if *holder == ours), "{refused}");
}

#[test]
fn a_busy_port_is_named() {
    let dir = passable_dir();
    let busy = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = busy.local_addr().unwrap().port();
    let config = ClusterConfig { port: Some(port), ..ClusterConfig::new(dir.path()) };
    let refused = open(config.clone()).unwrap().start(&mut |_| {}).unwrap_err();
    assert!(matches!(refused, StartError::PortBusy { port: named } if named == port), "{refused}");

    drop(busy);
    let server = open(config).unwrap().start(&mut |_| {}).unwrap();
    assert_eq!(server.port(), port);
    connect(&server);
}

#[test]
fn a_server_that_refuses_its_settings_is_shown_with_its_log() {
    let dir = passable_dir();
    let settings = vec![("max_connections".to_owned(), "many".to_owned())];
    let config = ClusterConfig { settings, ..ClusterConfig::new(dir.path()) };
    let refused = open(config).unwrap().start(&mut |_| {}).unwrap_err();
    assert!(
        matches!(&refused, StartError::Exited { tail, .. } if tail.contains("max_connections")),
        "{refused}"
    );
}

#[test]
fn an_interrupted_initdb_is_begun_anew() {
    let dir = passable_dir();
    fs::create_dir(dir.path().join("data.unfinished")).unwrap();
    fs::write(dir.path().join("data.unfinished/PG_VERSION"), "15\n").unwrap();
    connect(&start(dir.path()));
    assert!(!dir.path().join("data.unfinished").exists());
}

#[test]
fn a_path_too_long_for_a_socket_gets_a_short_one() {
    let dir = passable_dir();
    let deep = dir.path().join("a-folder-name-of-some-length".repeat(4));
    let server = start(&deep);
    let socket_dir = server.socket_dir().to_owned();
    assert!(socket_dir.join(format!(".s.PGSQL.{}", server.port())).exists());
    connect(&server);
    drop(server);
    assert!(!socket_dir.exists());
}

#[test]
fn a_lost_password_is_told_and_the_data_left_alone() {
    let dir = passable_dir();
    drop(open(ClusterConfig::new(dir.path())).unwrap());
    fs::remove_file(dir.path().join("password")).unwrap();
    let refused = open(ClusterConfig::new(dir.path())).unwrap_err();
    assert!(matches!(refused, OpenError::Incomplete { .. }), "{refused}");
    assert!(dir.path().join("data/PG_VERSION").exists());
}

/// Only root changes accounts, so only for root is any folder out of the server's reach.
#[test]
fn a_folder_closed_to_the_servers_account_is_linked_to_one_that_is_not() {
    let closed = tempfile::tempdir().unwrap();
    fs::set_permissions(closed.path(), Permissions::from_mode(0o700)).unwrap();
    let mut said = Vec::new();
    let config = ClusterConfig::new(closed.path().join("cluster"));
    let cluster =
        Cluster::open(Binaries::find().unwrap(), config.clone(), &mut |line| said.push(line.to_owned()))
            .unwrap();
    let home = cluster.data_dir().parent().unwrap().to_owned();
    let first = cluster.start(&mut |_| {}).unwrap();
    connect(&first).batch_execute("CREATE TABLE kept ()").unwrap();
    drop(first);

    let again = open(config).unwrap().start(&mut |_| {}).unwrap();
    connect(&again).batch_execute("SELECT FROM kept").unwrap();
    drop(again);
    if geteuid().is_root() {
        assert!(
            !home.starts_with(closed.path()) && said[0].contains(&home.display().to_string()),
            "{said:?}"
        );
        fs::remove_dir_all(home).unwrap();
    } else {
        assert_eq!(home, closed.path().join("cluster"));
    }
}

/// Not a test of its own: the process that the next two tests start and kill.
#[test]
#[ignore = "the owner that other tests kill"]
fn owner_to_be_killed() {
    let server = match std::env::args().next_back().as_deref() {
        Some("scratch") => {
            Cluster::open_scratch(Binaries::find().unwrap(), &mut |_| {}).unwrap().start(&mut |_| {}).unwrap()
        }
        Some(dir) if dir.starts_with('/') => start(Path::new(dir)),
        _ => return,
    };
    println!("\ndata={}", server.cluster().data_dir().display());
    loop {
        thread::park();
    }
}

/// Starts a process that owns a server, kills it without a chance to clean up, and returns where the data is.
fn start_and_kill_owner(dir: &Path) -> PathBuf {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner_to_be_killed", "--ignored", "--nocapture", "--"])
        .arg(dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let data =
        lines.map(Result::unwrap).find_map(|line| line.strip_prefix("data=").map(PathBuf::from)).unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    data
}

/// Not a test of its own: what the next test runs with fewer rights.
#[test]
#[ignore = "run by another test"]
fn start_where_told() {
    match std::env::args().next_back().as_deref() {
        Some(dir) if dir.starts_with('/') => drop(connect(&start(Path::new(dir)))),
        _ => {}
    }
}

/// In a container root usually lacks the right to look at the processes of others.
#[test]
fn a_server_left_behind_is_stopped_also_by_a_root_that_may_not_look_at_it() {
    let dir = passable_dir();
    let cluster = open(ClusterConfig::new(dir.path())).unwrap();
    let data = cluster.data_dir();
    let owner = fs::metadata(&data).unwrap();
    drop(cluster);
    let mut left = Command::new(Binaries::find().unwrap().dir().join("postgres"));
    let socket_dir = data.parent().unwrap().join("socket");
    left.arg("-D").arg(&data).arg("-k").arg(socket_dir).args(["-c", "listen_addresses="]);
    left.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut starter = Command::new(std::env::current_exe().unwrap());
    if geteuid().is_root() {
        left.uid(owner.uid()).gid(owner.gid());
        starter = Command::new("setpriv");
        starter.args(["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]);
        starter.arg(std::env::current_exe().unwrap());
    }
    let mut left = left.spawn().unwrap();
    wait_until("the server to be left behind to start", || {
        fs::read_to_string(data.join("postmaster.pid")).is_ok_and(|text| text.contains("ready"))
    });

    starter.args(["--exact", "start_where_told", "--ignored", "--nocapture", "--"]).arg(dir.path());
    let started = starter.output().unwrap();
    // By the starter, in its first act; by the second server's taking its place only after a minute.
    let ended = left.try_wait().unwrap();
    if ended.is_none() {
        left.kill().unwrap();
        left.wait().unwrap();
    }
    assert!(started.status.success(), "{started:?}");
    assert!(ended.is_some(), "two servers ran on the same data");
}

#[test]
fn a_killed_owner_leaves_no_server_and_no_scratch_folder() {
    let data = start_and_kill_owner(Path::new("scratch"));
    wait_until("the watchdog to stop the server and remove its folder", || !data.parent().unwrap().exists());
}

#[test]
fn the_folder_of_a_killed_owner_can_be_opened_at_once() {
    let dir = passable_dir();
    let data = start_and_kill_owner(dir.path());
    assert_eq!(data, dir.path().join("data"));
    connect(&start(dir.path()));
}
