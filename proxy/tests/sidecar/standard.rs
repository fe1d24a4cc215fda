//! Clients that are no sidecars: TLS as everybody speaks it, with a leaf of the mesh, let in by the same policies.
//!
//! `openssl`, `curl` and `psql` are asked where the machine has them; what they show is shown by rustls as well.

use crate::support::{App, Controller, LIMIT, Sidecar};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use weft_identity::credential::CREDENTIAL_FILE;
use weft_model::security::{Action, OnChange, SecurityPolicy};
use weft_testkit::{TestDatabase, wait_until};

const NAME: &str = "db.default.weft";

async fn serving(app: SocketAddr) -> (Controller, Sidecar) {
    let controller = Controller::start();
    for service in ["default/db", "default/web", "default/evil"] {
        controller.declare(service, &[5432]);
    }
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app).await;
    (controller, db)
}

/// The file that a sidecar keeps its identity in: a key, a leaf, and the roots.
struct Identity(TempDir);

impl Identity {
    fn of(controller: &Controller, instance: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        controller.credential(instance).save(dir.path()).unwrap();
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join(CREDENTIAL_FILE)
    }

    fn certificates(&self) -> impl Iterator<Item = CertificateDer<'static>> {
        CertificateDer::pem_file_iter(self.path()).unwrap().map(Result::unwrap)
    }

    fn config(&self, alpn: &[&[u8]]) -> ClientConfig {
        config(self, Some(self), alpn)
    }
}

/// As any client is configured that knows nothing of SPIFFE: trusted roots, a certificate, and names checked.
fn config(trusting: &Identity, being: Option<&Identity>, alpn: &[&[u8]]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    trusting.certificates().skip(1).for_each(|root| roots.add(root).unwrap());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match being {
        None => builder.with_no_client_auth(),
        Some(being) => {
            let leaf = being.certificates().take(1).collect();
            let key = PrivateKeyDer::from_pem_file(being.path()).unwrap();
            builder.with_client_auth_cert(leaf, key).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config
}

async fn connect(config: ClientConfig, address: SocketAddr, name: &str) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn ping(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let mut answer = [0; 4];
    stream.write_all(b"ping").await?;
    stream.flush().await?;
    timeout(LIMIT, stream.read_exact(&mut answer)).await??;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// The alert that ended it.
fn alert(error: &io::Error) -> Option<AlertDescription> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}

async fn refused(config: ClientConfig, address: SocketAddr, name: &str) -> Option<AlertDescription> {
    match connect(config, address, name).await {
        Err(error) => alert(&error),
        Ok(mut stream) => {
            // As a client does that speaks first, and much: what it said must not cost it the reason.
            let _ = stream.write_all(&[b'?'; 30_000]).await;
            let _ = stream.flush().await;
            alert(&timeout(LIMIT, stream.read(&mut [0])).await.unwrap().unwrap_err())
        }
    }
}

#[tokio::test]
async fn a_standard_client_is_let_in_and_told_when_it_is_not() {
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let mut client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    ping(&mut client).await.unwrap();
    assert_eq!(client.get_ref().1.alpn_protocol(), None);
    let live = db.json("/connections").await;
    assert_eq!((&live[0]["protocol"], &live[0]["port"]), (&"plain_tls".into(), &5432.into()));

    let evil = Identity::of(&controller, "default/evil/evil-1");
    assert_eq!(refused(evil.config(&[]), db.inbound, NAME).await, Some(AlertDescription::AccessDenied));
    let denied = db.record("policy_denied").await;
    assert_eq!(denied["source_identity"], "spiffe://weft.test/ns/default/svc/evil/inst/evil-1");
    assert_eq!(
        (&denied["rule"], &denied["protocol"]),
        (&"security/default/db#default".into(), &"plain_tls".into())
    );

    ping(&mut client).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(timeout(LIMIT, client.read(&mut [0])).await.unwrap().unwrap(), 0);
    let record = db.record("client_fin").await;
    assert_eq!((&record["bytes_up"], &record["bytes_down"]), (&8.into(), &8.into()));
    assert_eq!(record["source_identity"], "spiffe://weft.test/ns/default/svc/web/inst/web-9");
    assert_eq!(record["rule"], "security/default/db#the-test-allows");
    assert_eq!((&record["source"], record["tunnel_reused"].is_null()), (&record["peer"], true));
    assert_ne!(record["connection_id"], denied["connection_id"]);
}

#[tokio::test]
async fn policies_hold_for_live_connections_of_standard_clients() {
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let mut client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    ping(&mut client).await.unwrap();
    let keep = SecurityPolicy {
        default: Some(Action::Deny),
        on_change: Some(OnChange::Keep),
        ..SecurityPolicy::default()
    };
    db.runs(controller.put_security("default/db", keep)).await;
    ping(&mut client).await.unwrap();
    assert_eq!(refused(web.config(&[]), db.inbound, NAME).await, Some(AlertDescription::AccessDenied));
    controller.allow("default/db", &[]);
    assert!(timeout(LIMIT, client.read(&mut [0])).await.unwrap().is_err());
    assert_eq!(db.record("policy_changed").await["protocol"], "plain_tls");
}

#[tokio::test]
async fn a_name_says_which_service_and_which_port() {
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    for name in [NAME, "p5432.db.default.weft", "5432.db.default.weft"] {
        let mut client = connect(web.config(&[]), db.inbound, name).await.unwrap();
        ping(&mut client).await.unwrap();
    }
    // The certificate is good for every port's name, so that what is wrong is said by the sidecar.
    let unknown = Some(AlertDescription::UnrecognisedName);
    assert_eq!(refused(web.config(&[]), db.inbound, "http.db.default.weft").await, unknown);
    let record = db.record("no_snapshot").await;
    assert_eq!(record["detail"], "default/db declares no port http; it has p5432");
    for name in ["web.default.weft", "db.default", "localhost", "127.0.0.1"] {
        assert_eq!(refused(web.config(&[]), db.inbound, name).await, unknown, "{name}");
    }

    controller.declare("default/db", &[5432, 8080]);
    db.runs(controller.wanted("default/db/db-1")).await;
    assert_eq!(refused(web.config(&[]), db.inbound, NAME).await, unknown);
    let says =
        |detail: &str| detail.contains("does not say which port") && detail.contains("p5432.db.default.weft");
    wait_until("a record that says what is missing", LIMIT, async || {
        db.records().iter().any(|record| record["detail"].as_str().is_some_and(says))
    })
    .await;
    ping(&mut connect(web.config(&[]), db.inbound, "p5432.db.default.weft").await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn what_has_no_choice_is_agreed_and_what_has_is_left_to_the_client() {
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    for (offered, agreed) in [
        (&[b"postgresql".as_slice()][..], Some(b"postgresql".as_slice())),
        (&[b"h2".as_slice(), b"http/1.1"], None),
        (&[], None),
    ] {
        let mut client = connect(web.config(offered), db.inbound, NAME).await.unwrap();
        assert_eq!(client.get_ref().1.alpn_protocol(), agreed);
        ping(&mut client).await.unwrap();
    }
    let refused = refused(web.config(&[b"h2"]), db.inbound, "web.default.weft").await;
    assert_eq!(refused, Some(AlertDescription::UnrecognisedName));
    // The weft protocol is never plain.
    let sidecar = connect(web.config(&[b"h2", b"weft/1"]), db.inbound, NAME).await.unwrap();
    assert_eq!(sidecar.get_ref().1.alpn_protocol(), Some(b"weft/1".as_slice()));
}

#[tokio::test]
async fn who_shows_no_leaf_or_a_stranger_s_gets_an_alert() {
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let nobody = config(&web, None, &[]);
    assert_eq!(refused(nobody, db.inbound, NAME).await, Some(AlertDescription::CertificateRequired));
    // It trusts this mesh, which does not trust it.
    let other = Controller::start();
    let stranger = config(&web, Some(&Identity::of(&other, "default/web/web-9")), &[]);
    assert_eq!(refused(stranger, db.inbound, NAME).await, Some(AlertDescription::UnknownCA));
}

#[tokio::test]
async fn many_bytes_arrive_both_ways_unchanged() {
    const BYTES: usize = 24 << 20;
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    let (mut read, mut write) = tokio::io::split(client);
    let byte = |at: usize| (at.wrapping_mul(31) ^ at >> 13).to_le_bytes()[0];
    let send = async {
        let mut at = 0;
        while at < BYTES {
            // Records of all sizes.
            let chunk: Vec<u8> = (at..BYTES.min(at + 1 + at % 40_961)).map(byte).collect();
            write.write_all(&chunk).await.unwrap();
            at += chunk.len();
        }
        write.shutdown().await.unwrap();
    };
    let receive = async {
        let (mut at, mut chunk) = (0, vec![0; 1 << 16]);
        loop {
            let count = read.read(&mut chunk).await.unwrap();
            if count == 0 {
                return at;
            }
            assert!(chunk[..count].iter().zip(at..).all(|(got, at)| *got == byte(at)), "at {at}");
            at += count;
        }
    };
    let ((), received) = tokio::join!(send, receive);
    assert_eq!(received, BYTES);
    let record = db.record("client_fin").await;
    assert_eq!(
        (record["bytes_up"].as_u64(), record["bytes_down"].as_u64()),
        (Some(BYTES as u64), Some(BYTES as u64))
    );
}

/// Hears everything, then answers, then ends.
async fn patient() -> (App, mpsc::Receiver<Result<String, io::ErrorKind>>) {
    let (tell, heard) = mpsc::channel(2);
    let app = App::serve(move |mut stream| {
        let tell = tell.clone();
        async move {
            let mut said = String::new();
            let read = stream.read_to_string(&mut said).await;
            // A probe says nothing.
            if read.is_err() || !said.is_empty() {
                let ended = read.map(|_| said).map_err(|error| error.kind());
                let _ = stream.write_all(b"and good night").await;
                tell.send(ended).await.unwrap();
            }
        }
    });
    (app.await, heard)
}

#[tokio::test]
async fn a_client_that_says_close_notify_still_hears_the_server() {
    let (app, mut heard) = patient().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let mut client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    client.write_all(b"good night").await.unwrap();
    // Close_notify, and the end of its half of the TCP connection.
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(LIMIT, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(
        (heard.recv().await.unwrap().unwrap().as_str(), answer.as_str()),
        ("good night", "and good night")
    );
    assert_eq!(db.record("client_fin").await["bytes_down"], 14);
}

#[tokio::test]
async fn a_client_that_leaves_without_a_word_is_no_clean_end() {
    let (app, mut heard) = patient().await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let mut client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    client.write_all(b"good night").await.unwrap();
    client.flush().await.unwrap();
    // A FIN, as anybody on the way could send it.
    client.get_mut().0.shutdown().await.unwrap();
    assert_eq!(heard.recv().await.unwrap(), Err(io::ErrorKind::ConnectionReset));
    db.record("client_reset").await;
}

#[tokio::test]
async fn a_server_that_ends_first_says_close_notify_and_hears_the_client() {
    let (tell, mut heard) = mpsc::channel(2);
    let app = App::serve(move |mut stream| {
        let tell = tell.clone();
        async move {
            let _ = stream.write_all(b"only this").await;
            let _ = stream.shutdown().await;
            let mut said = String::new();
            // A probe says nothing.
            if stream.read_to_string(&mut said).await.is_ok_and(|bytes| bytes > 0) {
                tell.send(said).await.unwrap();
            }
        }
    })
    .await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let mut client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    let mut answer = String::new();
    // Without close_notify rustls takes the end for a broken one.
    timeout(LIMIT, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "only this");
    client.write_all(b"but I was not done").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(heard.recv().await.unwrap(), "but I was not done");
    db.record("server_fin").await;
}

#[tokio::test]
async fn a_client_that_breaks_after_its_end_is_noticed_while_the_server_says_nothing() {
    let (tell, mut heard) = mpsc::channel(2);
    let app = App::serve(move |mut stream| {
        let tell = tell.clone();
        async move {
            let mut said = String::new();
            if stream.read_to_string(&mut said).await.is_ok_and(|bytes| bytes > 0) {
                tell.send(None).await.unwrap();
                let broken = stream.ready(tokio::io::Interest::ERROR).await;
                tell.send(Some(broken.is_ok())).await.unwrap();
            }
        }
    })
    .await;
    let (controller, db) = serving(app.address).await;
    let web = Identity::of(&controller, "default/web/web-9");
    let mut client = connect(web.config(&[]), db.inbound, NAME).await.unwrap();
    client.write_all(b"good night").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(heard.recv().await.unwrap(), None);
    crate::support::app::reset(client.into_inner().0);
    assert_eq!(timeout(LIMIT, heard.recv()).await.unwrap().unwrap(), Some(true));
    db.record("client_reset").await;
}

#[tokio::test]
async fn only_a_question_of_postgresql_is_answered_in_the_clear_and_only_once() {
    const QUESTION: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    let app = App::echo().await;
    let (controller, db) = serving(app.address).await;
    let ends = async |mut stream: TcpStream| {
        let mut rest = Vec::new();
        let _ = timeout(LIMIT, stream.read_to_end(&mut rest)).await.unwrap();
        rest
    };
    // In as many pieces as there are bytes.
    let mut stream = TcpStream::connect(db.inbound).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in QUESTION {
        stream.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answer = [0];
    timeout(LIMIT, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"S");
    // TLS from here on.
    let web = Identity::of(&controller, "default/web/web-9");
    let name = ServerName::try_from(NAME).unwrap();
    let mut client = TlsConnector::from(Arc::new(web.config(&[]))).connect(name, stream).await.unwrap();
    ping(&mut client).await.unwrap();

    let mut twice = TcpStream::connect(db.inbound).await.unwrap();
    twice.write_all(&QUESTION).await.unwrap();
    timeout(LIMIT, twice.read_exact(&mut answer)).await.unwrap().unwrap();
    twice.write_all(&QUESTION).await.unwrap();
    assert_eq!(ends(twice).await, b"");
    // What is said in the clear behind the question is nobody's.
    let mut hasty = TcpStream::connect(db.inbound).await.unwrap();
    hasty.write_all(&[&QUESTION[..], b"and what I want"].concat()).await.unwrap();
    assert_eq!(ends(hasty).await, b"");
    for nonsense in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0, 0, 0, 8, 4, 210, 22, 48], &[0; 64]] {
        let mut stream = TcpStream::connect(db.inbound).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        assert_eq!(ends(stream).await, b"");
    }
}

/// Runs a program that most machines have; none, said aloud, if this one has not.
async fn run(program: &str, arrange: impl FnOnce(&mut Command)) -> Option<Output> {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    arrange(&mut command);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    match output {
        Ok(output) => Some(output),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("NOT SHOWN: this machine has no {program}");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test]
async fn openssl_gets_in_and_is_told_why_not() {
    let app = App::serve(|mut stream| async move {
        let _ = stream.write_all(b"welcome\n").await;
        let _ = stream.shutdown().await;
    })
    .await;
    let (controller, db) = serving(app.address).await;
    for (instance, name, shown) in [
        ("default/web/web-9", NAME, "welcome"),
        ("default/evil/evil-1", NAME, "alert access denied"),
        ("default/web/web-9", "db.elsewhere.weft", "alert number 112"),
    ] {
        let identity = Identity::of(&controller, instance);
        let output = run("openssl", |command| {
            let file = identity.path();
            command.args(["s_client", "-ign_eof", "-connect", &db.inbound.to_string(), "-servername", name]);
            command.args(["-verify_return_error", "-verify_hostname", name, "-CAfile"]).arg(&file);
            command.arg("-cert").arg(&file).arg("-key").arg(&file);
        });
        let Some(output) = output.await else { return };
        let output = text(&output);
        assert!(output.contains(shown), "{instance} to {name} by openssl: {output}");
    }
}

#[tokio::test]
async fn curl_speaks_http() {
    let app = App::serve(|mut stream| async move {
        let mut request = vec![0; 2048];
        if stream.read(&mut request).await.is_ok_and(|bytes| bytes > 0) {
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nwelcome";
            let _ = stream.write_all(answer).await;
        }
    })
    .await;
    let (controller, db) = serving(app.address).await;
    let identity = Identity::of(&controller, "default/web/web-9");
    let output = run("curl", |command| {
        let file = identity.path();
        command.args(["--silent", "--show-error", "--max-time", "20", "--connect-to"]);
        command.arg(format!("{NAME}:443:{}", db.inbound)).arg(format!("https://{NAME}/"));
        command.arg("--cacert").arg(&file).arg("--cert").arg(&file).arg("--key").arg(&file);
    });
    let Some(output) = output.await else { return };
    assert_eq!(text(&output), "welcome");
}

/// A URL's parts, as far as clients are to be told them one by one.
struct Parts {
    user: String,
    password: String,
    address: SocketAddr,
    database: String,
}

async fn parts(url: &str) -> Parts {
    let (_, rest) = url.split_once("://").unwrap();
    let (account, place) = rest.rsplit_once('@').unwrap();
    let (user, password) = account.split_once(':').unwrap_or((account, ""));
    let (address, database) = place.split_once('/').unwrap();
    let database = database.split('?').next().unwrap();
    let address = if address.contains(':') { address.to_owned() } else { format!("{address}:5432") };
    let address = tokio::net::lookup_host(&address).await.unwrap().next().unwrap();
    Parts { user: user.into(), password: password.into(), address, database: database.into() }
}

/// Also one of before version 17, which asks for TLS in PostgreSQL's own way.
#[tokio::test]
async fn psql_connects_with_verify_full() {
    let database = TestDatabase::create().await;
    let parts = parts(database.url()).await;
    let (controller, db) = serving(parts.address).await;
    let identity = Identity::of(&controller, "default/web/web-9");
    let file = identity.path();
    let file = file.display();
    for sslmode in ["verify-full", "verify-ca", "require", "prefer"] {
        let asked = format!(
            "host={NAME} hostaddr={} port={} user={} dbname={} sslmode={sslmode} sslrootcert={file} sslcert={file} \
             sslkey={file} gssencmode=disable connect_timeout=20",
            db.inbound.ip(),
            db.inbound.port(),
            parts.user,
            parts.database,
        );
        let output = run("psql", |command| {
            command.env("PGPASSWORD", &parts.password).args(["-XAtc", "select 6 * 7", &asked]);
        });
        let Some(output) = output.await else { break };
        assert_eq!(text(&output).trim(), "42", "{sslmode}");
    }
    database.close().await;
}
