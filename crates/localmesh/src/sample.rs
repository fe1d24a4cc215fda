//! What the sample mesh consists of, and how each of its processes is run.

use crate::child::Recipe;
use crate::error::StartError;
use crate::home::{Home, write_private};
use crate::mesh::Programs;
use crate::ports::{BASE_PORT, Ports};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use weft_identity::credential::Credential;

/// The sample resources, as they are applied at the first start.
const RESOURCES: &str = include_str!("../samples/mesh.yaml");
/// The first controller's process. Its port is the mesh's first, and tells meshes on one machine apart.
pub(crate) const CONTROLLER: &str = "controller";
/// What a process's name ends with if it is an instance's app and not its sidecar.
const APP: &str = "-app";

/// One of several controllers of one mesh. They share the state directory, and with it the certificate authority; each has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Controller {
    /// From 1.
    number: u8,
}

impl Controller {
    /// So many.
    pub(crate) fn first(count: NonZeroU8) -> impl Iterator<Item = Self> + Clone {
        (1..=count.get()).map(|number| Self { number })
    }

    /// Its process.
    pub(crate) fn process(self) -> String {
        if self.number == 1 { CONTROLLER.to_owned() } else { format!("{CONTROLLER}-{}", self.number) }
    }

    /// What its ports are called: for sidecars and operators, and for questions about itself.
    pub(crate) fn ports(self) -> [String; 2] {
        [self.process(), format!("{} admin", self.process())]
    }

    pub(crate) fn address(self, ports: &Ports) -> String {
        local(ports.get(&self.process()))
    }

    pub(crate) fn recipe(self, home: &Home, programs: &Programs, ports: &Ports) -> Recipe {
        let [_, admin] = self.ports();
        let mut args = Args::default();
        args.pair("--database-url-file", home.secret("controller.url"));
        args.pair("--listen", self.address(ports));
        args.pair("--admin-listen", local(ports.get(&admin)));
        args.pair("--state-dir", home.controller());
        args.pair("--name", format!("controller-{}", self.number));
        recipe(home, &self.process(), &programs.controller, args)
    }
}

/// One of the sample services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Service {
    Web,
    Api,
    Db,
}

/// One instance: a sidecar, and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) service: Service,
    /// Such as `api-2`; the name of the sidecar's process too.
    pub(crate) name: String,
}

impl Service {
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Api => "api",
            Self::Db => "db",
        }
    }

    /// The port that clients name, and what the service connects to itself: service, its port.
    pub(crate) const fn port(self) -> u16 {
        match self {
            Self::Web | Self::Api => 8080,
            Self::Db => 5432,
        }
    }

    pub(crate) const fn upstream(self) -> Option<Self> {
        match self {
            Self::Web => Some(Self::Api),
            Self::Api => Some(Self::Db),
            Self::Db => None,
        }
    }
}

impl Instance {
    /// Those that a mesh starts with, in the order of their start: whoever is called before whoever calls.
    pub(crate) fn initial() -> Vec<Self> {
        [(Service::Db, "db-1"), (Service::Api, "api-1"), (Service::Api, "api-2"), (Service::Web, "web-1")]
            .map(|(service, name)| Self { service, name: name.to_owned() })
            .to_vec()
    }

    /// The full name in the mesh.
    pub(crate) fn id(&self) -> String {
        format!("default/{}/{}", self.service.word(), self.name)
    }

    /// The name of its app's process; none for the database, which is no child of ours.
    pub(crate) fn app(&self) -> Option<String> {
        match self.service {
            Service::Web | Service::Api => Some(format!("{}{APP}", self.name)),
            Service::Db => None,
        }
    }

    /// What its ports are called.
    pub(crate) fn ports(&self) -> Vec<String> {
        let mut parts = vec!["inbound", "admin"];
        if self.service.upstream().is_some() {
            parts.extend(["app", "outbound"]);
        }
        parts.into_iter().map(|part| self.port(part)).collect()
    }

    pub(crate) fn port(&self, part: &str) -> String {
        format!("{} {part}", self.name)
    }

    /// What the sidecar holds on disk.
    pub(crate) fn credential(&self, home: &Home) -> Option<Credential> {
        Credential::load(&home.proxy(&self.name).join("identity")).ok()
    }
}

/// The sample resources. Two meshes on one machine must not want the same loopback addresses, so one that is not at the
/// usual ports asks for addresses of its own.
pub(crate) fn resources(ports: &Ports) -> String {
    let port = ports.get(CONTROLLER);
    if port == BASE_PORT {
        return RESOURCES.to_owned();
    }
    // 14 bits of the port make the second and third byte within 127.64.0.0/10, two bits the fourth.
    let [high, low] = (port >> 2).to_be_bytes();
    let last = (port & 3) * 16;
    let mut text = RESOURCES.to_owned();
    for (service, offset) in [(Service::Web, 1), (Service::Api, 2), (Service::Db, 3)] {
        let name = format!("kind: Service\nname: default/{}\n", service.word());
        let address = format!("{name}address: 127.{}.{low}.{}\n", 64 + high, last + offset);
        text = text.replace(&name, &address);
    }
    text
}

/// The sidecar of an instance. `controllers` is where these are, `database` where the database server is, whoever runs it; `token` is
/// the file of a join token, for a sidecar that has no identity yet.
pub(crate) fn sidecar(
    home: &Home,
    programs: &Programs,
    ports: &Ports,
    controllers: &[String],
    database: SocketAddr,
    instance: &Instance,
    token: Option<&Path>,
) -> Recipe {
    let port = |part| ports.get(&instance.port(part));
    let mut args = Args::default();
    args.pair("--controller", controllers.join(","));
    args.pair("--instance", instance.id());
    if let Some(token) = token {
        args.pair("--join-token-file", token);
    }
    args.pair("--state-dir", home.proxy(&instance.name));
    args.pair("--inbound-listen", local(port("inbound")));
    args.pair("--admin-listen", local(port("admin")));
    args.pair("--connection-log", home.connections(&instance.name));
    // A person who kills something wants to see what happens, not to wait for the next probe or drain.
    args.pair("--probe-interval", "1s");
    args.pair("--drain-deadline", "3s");
    let app = match instance.service {
        Service::Web | Service::Api => local(port("app")),
        Service::Db => database.to_string(),
    };
    args.pair("--app", format!("{}={app}", instance.service.port()));
    if let Some(upstream) = instance.service.upstream() {
        let target = format!("default/{}:{}", upstream.word(), upstream.port());
        args.pair("--upstream", format!("{target}={}", local(port("outbound"))));
    }
    if instance.service == Service::Web {
        // It knows db without being allowed to query it, so that a refusal can be tried.
        args.pair("--upstream", "default/db:5432");
        args.flag("--loopback-addresses");
    }
    recipe(home, &instance.name, &programs.proxy, args)
}

/// What the database's port is called.
pub(crate) const POSTGRES: &str = "postgresql";

/// The app of an instance, and the files that it needs.
pub(crate) fn app(
    home: &Home,
    programs: &Programs,
    ports: &Ports,
    instance: &Instance,
) -> Result<Option<Recipe>, StartError> {
    let Some(name) = instance.app() else { return Ok(None) };
    let outbound = local(ports.get(&instance.port("outbound")));
    let mut args = Args::default();
    args.flag("sample");
    args.flag(instance.service.word());
    args.pair("--name", &instance.name);
    args.pair("--listen", local(ports.get(&instance.port("app"))));
    match instance.service {
        Service::Web => args.pair("--api", format!("http://{outbound}/")),
        Service::Api => {
            let file = database_url(home, instance, &outbound)?;
            args.pair("--database-url-file", file);
        }
        Service::Db => {}
    }
    Ok(Some(recipe(home, &name, &programs.weft, args)))
}

/// The URL under which an api instance reaches its database: its own sidecar's port, everything else as it is.
fn database_url(home: &Home, instance: &Instance, outbound: &str) -> Result<PathBuf, StartError> {
    let (from, to) = (home.secret("shop.url"), home.secret(&format!("{}.url", instance.name)));
    let direct = std::fs::read_to_string(&from);
    let direct = direct.map_err(StartError::io(format!("reading {}", from.display())))?;
    let url = direct.trim().rsplit_once('@').and_then(|(credentials, place)| {
        let (_, database) = place.split_once('/')?;
        Some(format!("{credentials}@{outbound}/{database}\n"))
    });
    let url = url.ok_or(StartError::DatabaseUrl("the sample database's URL is damaged"))?;
    write_private(&to, &url).map_err(StartError::io(format!("writing {}", to.display())))?;
    Ok(to)
}

/// An address of this machine that other machines cannot reach.
pub(crate) fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn recipe(home: &Home, name: &str, program: &Path, args: Args) -> Recipe {
    Recipe { name: name.to_owned(), program: program.to_owned(), args: args.0, log: home.log(name) }
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::PortChoice;
    use weft_model::service::is_service_address;

    fn fixture() -> (tempfile::TempDir, Home, Ports) {
        let dir = tempfile::tempdir().unwrap();
        let mut home = Home::at(dir.path());
        home.create().unwrap();
        let mut ports = Ports::choose(&home, PortChoice::Free).unwrap();
        for instance in Instance::initial() {
            for port in instance.ports() {
                ports.reserve(&port).unwrap();
            }
        }
        ports.reserve(CONTROLLER).unwrap();
        (dir, home, ports)
    }

    #[test]
    fn meshes_at_other_ports_have_other_addresses() {
        let (_dir, _, ports) = fixture();
        let text = resources(&ports);
        let addresses: Vec<std::net::Ipv4Addr> =
            text.lines().filter_map(|line| line.strip_prefix("address: ")?.parse().ok()).collect();
        assert_eq!(addresses.len(), 3, "{text}");
        assert!(addresses.iter().all(|address| is_service_address(*address)), "{addresses:?}");
    }

    #[test]
    fn only_web_has_loopback_addresses_and_secrets_are_in_no_argument() {
        let (_dir, home, ports) = fixture();
        std::fs::write(home.secret("shop.url"), "postgres://shop:hush@127.0.0.1:1/shop\n").unwrap();
        let programs = Programs::beside(Path::new("/x/weft"));
        let database = "192.0.2.7:5432".parse().unwrap();
        let controllers = ["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()];
        for instance in Instance::initial() {
            let sidecar = sidecar(&home, &programs, &ports, &controllers, database, &instance, None);
            let loopback = sidecar.args.contains(&OsString::from("--loopback-addresses"));
            assert_eq!(loopback, instance.service == Service::Web);
            assert!(sidecar.args.contains(&OsString::from("127.0.0.1:1,127.0.0.1:2")));
            let before_database = sidecar.args.contains(&OsString::from("5432=192.0.2.7:5432"));
            assert_eq!(before_database, instance.service == Service::Db);
            let app = app(&home, &programs, &ports, &instance).unwrap();
            assert_eq!(app.is_some(), instance.service != Service::Db);
            let mut args = sidecar.args.iter().chain(app.iter().flat_map(|app| &app.args));
            assert!(!args.any(|arg| arg.to_string_lossy().contains("hush")));
        }
        let url = std::fs::read_to_string(home.secret("api-1.url")).unwrap();
        let outbound = ports.get("api-1 outbound");
        assert_eq!(url, format!("postgres://shop:hush@127.0.0.1:{outbound}/shop\n"));
    }
}
