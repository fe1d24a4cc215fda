//! Upgrade in place: a new process takes the place of the running one, on the same listening sockets, and no connection is refused.
//!
//! The running sidecar listens on a Unix socket in its state directory. The new one connects, and they agree step by step ([`wire`]):
//!
//! 1. `hello`, `welcome`: same instance, a hand-over that both speak.
//! 2. `sockets`, `next`: every listening socket goes over ([`offers`], [`inherited`]). They are the same sockets, with the connections that
//!    wait in them, so nothing is lost when the old process closes its copies. (Sockets of its own on the same ports, by `SO_REUSEPORT`,
//!    would not do: what waits in a socket that is closed is reset.)
//! 3. `ready`: the new one has leaf and snapshot, and accepts beside the old one.
//! 4. `yours`: the old one has stopped to follow the controller, and gives away the lock of the state directory. From here on the new one
//!    renews the leaf, reports health, acknowledges and writes.
//! 5. `took`: the old one stops accepting and drains.
//!
//! Until `yours` whatever goes wrong on either side leaves the old one as it was; the new one ends. If the old one dies after `ready` the new
//! one gets the lock, which tells it so, and goes on. If the new one dies after `yours` the old one follows the controller again. There is
//! no time limit on `took`: an answer that may still come is not guessed at.
//!
//! Who may ask: the owner of the process, and root. Read `tests/sidecar/upgrade.rs`.

pub(crate) mod inherited;
pub(crate) mod lock;
pub(crate) mod offers;
mod wire;

use crate::config::Config;
use inherited::Inherited;
use lock::Lock;
use offers::{Offered, Offers};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::task::spawn_blocking;
use weft_model::{Chain, InstanceId};
use wire::{Message, Wire};

/// The socket in the state directory.
const SOCKET: &str = "upgrade";

/// How hand-overs are spoken. A change that the other side would misunderstand gets another number.
const SPEAKS: u32 = 1;

/// How long the other side may take for a step that is done at once.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the new process may take to read its snapshot and to open what it did not get.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a new process waits for its turn: there may be another one before it.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// Most sockets that are handed over: a socket for each of a thousand addresses and 32 threads.
const SOCKETS_MAX: usize = 32_768;

/// A hand-over did not come about. The running sidecar goes on.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The running sidecar said no.
    #[error("the running sidecar does not hand over: {0}")]
    Refused(String),
    /// It cannot be talked to, or broke off.
    #[error("the running sidecar cannot be talked to; it goes on as it was")]
    Talk(#[source] io::Error),
    /// It broke off after everything was there, and lives.
    #[error("the running sidecar broke off the hand-over and goes on as it was")]
    BrokenOff,
    /// There is nothing to serve by.
    #[error(
        "there is no snapshot in the state directory to go on with; the running sidecar goes on as it was"
    )]
    NoSnapshot,
    /// What was sent makes no sense.
    #[error("the running sidecar says what is not understood: {0}")]
    Nonsense(&'static str),
    /// Another sidecar uses the state directory.
    #[error(
        "another sidecar runs with the state directory {}; stop it, or take its place with --upgrade",
        .0.display()
    )]
    InUse(PathBuf),
}

/// A path that is short enough for a socket's address, however long the directory's is. Good as long as `dir` is open.
fn short(dir: &File) -> PathBuf {
    let fd = std::os::fd::AsRawFd::as_raw_fd(dir);
    Path::new("/proc/self/fd").join(fd.to_string()).join(SOCKET)
}

/// The next one that asks `host`; none ever without one.
pub(crate) async fn asked(host: Option<&Host>) -> Asked {
    match host {
        Some(host) => host.asked().await,
        None => std::future::pending().await,
    }
}

/// Tells a service manager that this process is the service's now (sd_notify(3)).
pub(crate) fn notify(socket: &Path) {
    let told = UnixDatagram::unbound().and_then(|from| {
        let text = format!("READY=1\nMAINPID={}\n", std::process::id());
        let name = socket.as_os_str().as_bytes();
        match name.strip_prefix(b"@") {
            Some(name) => from.send_to_addr(text.as_bytes(), &SocketAddr::from_abstract_name(name)?),
            None => from.send_to(text.as_bytes(), socket),
        }
    });
    if let Err(error) = told {
        tracing::warn!(%error, "the service manager was not told of the upgrade");
    }
}

/// The running sidecar's side: where new ones ask.
#[derive(Debug)]
pub(crate) struct Host {
    listener: UnixListener,
    path: PathBuf,
    /// The file that the socket is.
    inode: u64,
}

impl Host {
    /// Listens in the state directory, in the place of whoever did before. The caller has the directory's lock.
    ///
    /// # Errors
    /// If the directory takes no socket.
    pub(crate) fn listen(state_dir: &Path) -> io::Result<Self> {
        let dir = File::open(state_dir)?;
        let path = short(&dir);
        let long = state_dir.join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&path)?;
        // The directory lets nobody else in; this is the second lock on the same door.
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let inode = fs::metadata(&long)?.ino();
        Ok(Self { listener, path: long, inode })
    }

    /// Whether new processes still find it. One that died at its last step may have put its own in its place.
    pub(crate) fn is_found(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode)
    }

    /// The next one that asks and may.
    pub(crate) async fn asked(&self) -> Asked {
        loop {
            let accepted = self.listener.accept().await.and_then(|(stream, _)| {
                let asks = stream.peer_cred()?.uid();
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok((asks, stream))
            });
            match accepted {
                Ok((asks, stream)) if asks == 0 || asks == nix::unistd::geteuid().as_raw() => {
                    return Asked { wire: Wire::new(stream) };
                }
                Ok((asks, _)) => tracing::warn!(uid = asks, "a stranger asks for the sockets; it gets none"),
                Err(error) => {
                    tracing::warn!(%error, "an upgrade cannot be listened to");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
}

/// Somebody asks to take this sidecar's place.
#[derive(Debug)]
pub(crate) struct Asked {
    wire: Wire,
}

impl Asked {
    /// Breaks the conversation off, whoever is waiting in it.
    ///
    /// # Errors
    /// If the system gives no second handle.
    pub(crate) fn breaker(&self) -> io::Result<UnixStream> {
        self.wire.stream().try_clone()
    }

    /// Hands the sockets over, and waits until the new one is ready.
    ///
    /// # Errors
    /// If it is not to have them, does not understand, breaks off, or takes too long. It was told why.
    pub(crate) async fn give(self, instance: &InstanceId, offers: &Offers) -> Result<Ready, UpgradeError> {
        let (instance, offered) = (instance.to_string(), offers.live());
        blocking(move || {
            let Self { mut wire } = self;
            give(&mut wire, &instance, &offered)?;
            Ok(Ready { wire })
        })
        .await
    }
}

fn give(wire: &mut Wire, instance: &str, offered: &[Offered]) -> Result<(), UpgradeError> {
    let refuse = |wire: &mut Wire, why: String| {
        // Who is gone need not be told.
        let _ = wire.say(&Message::Refused { why: why.clone() }, &[]);
        Err(UpgradeError::Refused(why))
    };
    let (speaks, other) = match wire.hear(STEP_TIMEOUT)?.0 {
        Message::Hello { speaks, instance, .. } => (speaks, instance),
        _ => return Err(UpgradeError::Nonsense("it does not greet")),
    };
    if !speaks.contains(&SPEAKS) {
        return refuse(
            wire,
            format!("this one speaks hand-over {SPEAKS}, the new one {speaks:?}; restart it"),
        );
    }
    if other != instance {
        return refuse(wire, format!("this is {instance}, not {other}"));
    }
    if offered.len() > SOCKETS_MAX {
        return refuse(wire, format!("there are more than {SOCKETS_MAX} sockets; restart it"));
    }
    wire.say(&Message::Welcome { speaks: SPEAKS, release: release(), sockets: offered.len() }, &[])?;
    for some in offered.chunks(wire::SOCKETS_EACH) {
        let Message::Next = wire.hear(STEP_TIMEOUT)?.0 else {
            return Err(UpgradeError::Nonsense("it asks for no sockets"));
        };
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(|offered| offered.socket.as_fd()).collect();
        wire.say(&Message::Sockets { ways: some.iter().map(|offered| offered.way.clone()).collect() }, &fds)?;
    }
    match wire.hear(READY_TIMEOUT)?.0 {
        Message::Ready => Ok(()),
        _ => Err(UpgradeError::Nonsense("it is not ready")),
    }
}

/// A new one that accepts beside this sidecar.
#[derive(Debug)]
pub(crate) struct Ready {
    wire: Wire,
}

impl Ready {
    /// Gives it everything that is left: it is the sidecar now. `registered` says as what this one made the instance known.
    ///
    /// # Errors
    /// If it is gone. Then this one is the sidecar as before.
    pub(crate) async fn yield_to(
        self,
        lock: Option<&Lock>,
        registered: Option<String>,
    ) -> Result<(), UpgradeError> {
        let lock = lock.map(Lock::share).transpose().map_err(UpgradeError::Talk)?;
        blocking(move || {
            let Self { mut wire } = self;
            let fds: Vec<BorrowedFd<'_>> = lock.iter().map(AsFd::as_fd).collect();
            wire.say(&Message::Yours { registered }, &fds)?;
            // As long as it lives the answer may come.
            match wire.hear_whenever()?.0 {
                Message::Took => Ok(()),
                _ => Err(UpgradeError::Nonsense("it did not take over")),
            }
        })
        .await
    }

    /// Tells it that it is not to take over after all.
    pub(crate) async fn refuse(self, why: String) {
        let told = blocking(move || {
            let Self { mut wire } = self;
            wire.say(&Message::Refused { why }, &[]).map_err(UpgradeError::Talk)
        });
        // Who is gone need not be told.
        let _ = told.await;
    }
}

/// The new process' side: a conversation with the running one.
#[derive(Debug)]
pub(crate) struct Succession {
    wire: Wire,
}

/// What the new process was given in the end.
#[derive(Debug)]
pub(crate) struct Yours {
    /// The lock of the state directory, if there is one.
    pub(crate) lock: Option<Lock>,
    /// As what the old one had made the instance known.
    pub(crate) registered: Option<String>,
    wire: Option<Wire>,
}

impl Succession {
    /// Asks the sidecar that runs with the state directory for its sockets. None if none runs there.
    ///
    /// # Errors
    /// If it runs and does not hand over.
    pub(crate) async fn begin(config: &Config) -> Result<Option<(Self, Inherited)>, UpgradeError> {
        let (dir, instance) = (config.state_dir.clone(), config.instance.to_string());
        blocking(move || {
            let connected = File::open(dir).and_then(|dir| UnixStream::connect(short(&dir)));
            let stream = match connected {
                Ok(stream) => stream,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            };
            let mut wire = Wire::new(stream);
            let inherited = receive(&mut wire, instance)?;
            Ok(Some((Self { wire }, inherited)))
        })
        .await
    }

    /// Says that this process serves, and waits until it is the sidecar.
    ///
    /// # Errors
    /// If the old one keeps its place.
    pub(crate) async fn finish(self, state_dir: &Path) -> Result<Yours, UpgradeError> {
        let state_dir = state_dir.to_owned();
        blocking(move || {
            let Self { mut wire } = self;
            let heard = wire.say(&Message::Ready, &[]).and_then(|()| wire.hear(READY_TIMEOUT));
            match heard {
                Ok((Message::Yours { registered }, mut fds)) => {
                    let lock = fds.pop().map(Lock::from);
                    Ok(Yours { lock, registered, wire: Some(wire) })
                }
                Ok((Message::Refused { why }, _)) => Err(UpgradeError::Refused(why)),
                Ok(_) => Err(UpgradeError::Nonsense("it does not let go")),
                Err(error) => match Lock::take(&state_dir) {
                    Ok(Some(lock)) => {
                        tracing::warn!(%error, "the old process is gone; going on without it");
                        Ok(Yours { lock: Some(lock), registered: None, wire: None })
                    }
                    Ok(None) | Err(_) => Err(UpgradeError::BrokenOff),
                },
            }
        })
        .await
    }
}

impl Yours {
    /// Tells the old one that it may stop accepting.
    pub(crate) async fn took(&mut self) {
        let Some(mut wire) = self.wire.take() else { return };
        let told = blocking(move || wire.say(&Message::Took, &[]).map_err(UpgradeError::Talk)).await;
        if let Err(error) = told {
            tracing::warn!(error = %Chain(&error), "the old process was gone before it was told");
        }
    }
}

fn receive(wire: &mut Wire, instance: String) -> Result<Inherited, UpgradeError> {
    wire.say(&Message::Hello { speaks: vec![SPEAKS], release: release(), instance }, &[])?;
    let sockets = match wire.hear(TURN_TIMEOUT)?.0 {
        Message::Welcome { speaks: SPEAKS, release, sockets } if sockets <= SOCKETS_MAX => {
            tracing::info!(release, sockets, "taking over from the running sidecar");
            sockets
        }
        Message::Refused { why } => return Err(UpgradeError::Refused(why)),
        _ => return Err(UpgradeError::Nonsense("it does not greet")),
    };
    let mut inherited = Inherited::default();
    let mut left = sockets;
    while left > 0 {
        wire.say(&Message::Next, &[])?;
        let (Message::Sockets { ways }, fds) = wire.hear(STEP_TIMEOUT)? else {
            return Err(UpgradeError::Nonsense("it sends no sockets"));
        };
        if ways.is_empty() || ways.len() != fds.len() || ways.len() > left {
            return Err(UpgradeError::Nonsense("it sends other sockets than it says"));
        }
        left -= ways.len();
        for (way, fd) in ways.into_iter().zip(fds) {
            inherited.add(way, fd)?;
        }
    }
    Ok(inherited)
}

impl From<io::Error> for UpgradeError {
    fn from(error: io::Error) -> Self {
        Self::Talk(error)
    }
}

fn release() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, UpgradeError> + Send + 'static,
) -> Result<T, UpgradeError> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(UpgradeError::Talk(io::Error::other(error))))
}
