//! Databases and roles on the server: one pair for the mesh, one for the sample `db` service.
//!
//! | role | may |
//! |---|---|
//! | `weft_controller` | own the database `weft` and everything in it; act as `weft_appender`, `weft_projector`, `weft_reader` |
//! | `weft_sql` | read what `weft_reader` may read |
//! | `shop` | own the database `shop`, and nothing else |
//!
//! Passwords are made here, kept in the home and set anew at each start, so a home and a server that were not made
//! together still fit.

use crate::error::StartError;
use crate::home::{Home, write_private};
use postgres_protocol::password::scram_sha_256;
use std::fs;
use std::io;
use std::net::SocketAddr;
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config, NoTls};
use uuid::Uuid;

/// The mesh's database.
const MESH: &str = "weft";
/// The sample service's database, and its owner.
pub(crate) const SHOP: &str = "shop";
const OWNER: &str = "weft_controller";
const READER: &str = "weft_sql";

/// Roles with the rights for one duty each, which a session takes for what it does.
const DUTIES: [&str; 3] = ["weft_appender", "weft_projector", "weft_reader"];

/// What is in the sample database. It may be there already, with whatever was done to it.
const SHOP_TABLE: &str = "
    create table if not exists orders (
        id        bigint generated always as identity primary key,
        item      text not null,
        quantity  integer not null check (quantity > 0),
        placed_at timestamptz not null default now()
    );
    insert into orders (item, quantity)
        select item, quantity from (values ('yarn, red', 3), ('loom, small', 1), ('shuttle', 2)) as seed (item, quantity)
        where not exists (select from orders)";

/// Where the databases are.
#[derive(Clone, Debug)]
pub(crate) struct Databases {
    /// Of the server, as a role that may do everything; with its password.
    pub(crate) admin_url: String,
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Databases {
    /// Those of a server that somebody else runs.
    pub(crate) fn of_url(url: &str) -> Result<Self, StartError> {
        let config: Config =
            url.parse().map_err(|_| StartError::DatabaseUrl("it is not a PostgreSQL URL"))?;
        let host = match config.get_hosts() {
            [tokio_postgres::config::Host::Tcp(host)] => host.clone(),
            _ => return Err(StartError::DatabaseUrl("it must name one host, reached over TCP")),
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        Ok(Self { admin_url: url.to_owned(), host, port })
    }

    /// Where the server is, for a sidecar, which takes no names.
    pub(crate) async fn address(&self) -> Result<SocketAddr, StartError> {
        let host = (self.host.trim_start_matches('[').trim_end_matches(']'), self.port);
        let looking_up = || StartError::io(format!("looking up the database's host {}", self.host));
        let mut found = tokio::net::lookup_host(host).await.map_err(looking_up())?;
        found.next().ok_or_else(|| looking_up()(io::ErrorKind::NotFound.into()))
    }

    /// Makes databases, roles and passwords as far as they are missing, and writes the URLs into the home's secrets.
    pub(crate) async fn prepare(&self, home: &Home) -> Result<(), StartError> {
        let admin: Config =
            self.admin_url.parse().map_err(|_| StartError::DatabaseUrl("it is not a PostgreSQL URL"))?;
        let server = Session::open(&admin).await?;
        for (role, file) in [(OWNER, "controller.url"), (READER, "reader.url"), (SHOP, "shop.url")] {
            let database = if role == SHOP { SHOP } else { MESH };
            let password = self.password(home, file)?;
            server.role(role, &password).await?;
            let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
            let url = format!("postgres://{role}:{password}@{host}:{}/{database}", self.port);
            write_secret(home, file, &url)?;
            if role == SHOP {
                // For psql, whatever address it reaches the database through.
                write_secret(home, "pgpass", &format!("*:*:{SHOP}:{SHOP}:{password}"))?;
            }
        }
        server.run("make roles", &format!("grant weft_reader to {READER}")).await?;
        server.run("make roles", &format!("grant {} to {OWNER}", DUTIES.join(", "))).await?;
        server.database(MESH, OWNER).await?;
        server.run("grant access", &format!("grant connect on database {MESH} to {READER}")).await?;
        server.database(SHOP, SHOP).await?;

        let mut shop = admin.clone();
        shop.user(SHOP).password(self.password(home, "shop.url")?).dbname(SHOP);
        Session::open(&shop).await?.run("seed the sample database", SHOP_TABLE).await
    }

    /// Whether a scope has events; false if there is no log yet.
    pub(crate) async fn has_scope(&self, scope: &str) -> Result<bool, StartError> {
        let mut config: Config =
            self.admin_url.parse().map_err(|_| StartError::DatabaseUrl("it is not a PostgreSQL URL"))?;
        config.dbname(MESH);
        let session = Session::open(&config).await?;
        let sql = "select exists (select from weft.event where scope = $1)";
        let row = session.client.query_one(sql, &[&scope]).await;
        row.map(|row| row.get(0)).map_err(failed("read the log"))
    }

    /// The password in a URL file that an earlier start wrote, else a new one.
    fn password(&self, home: &Home, file: &str) -> Result<String, StartError> {
        let path = home.secret(file);
        let earlier = fs::read_to_string(&path).ok().and_then(|text| {
            let config: Config = text.trim().parse().ok()?;
            config.get_password().map(|password| String::from_utf8_lossy(password).into_owned())
        });
        // Two of them: a version 4 UUID has 122 random bits, of the system's generator.
        let fresh = || format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let password = earlier.filter(|password| password.bytes().all(|b| b.is_ascii_alphanumeric()));
        match password {
            Some(password) => Ok(password),
            None => {
                let password = fresh();
                write_secret(home, file, &format!("postgres://x:{password}@{}:{}/x", self.host, self.port))?;
                Ok(password)
            }
        }
    }
}

fn write_secret(home: &Home, file: &str, content: &str) -> Result<(), StartError> {
    let path = home.secret(file);
    write_private(&path, &format!("{content}\n"))
        .map_err(StartError::io(format!("writing {}", path.display())))
}

fn failed(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> StartError {
    move |source| StartError::Database { doing, source }
}

/// A connection and the task that drives it.
struct Session {
    client: Client,
    _driver: JoinSet<()>,
}

impl Session {
    async fn open(config: &Config) -> Result<Self, StartError> {
        let (client, connection) = config.connect(NoTls).await.map_err(failed("connect"))?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its errors reach the client's calls as well.
            let _ = connection.await;
        });
        Ok(Self { client, _driver: driver })
    }

    async fn run(&self, doing: &'static str, sql: &str) -> Result<(), StartError> {
        self.client.batch_execute(sql).await.map_err(failed(doing))
    }

    /// A role that may log in with this password. The server gets what it needs to check the password, never the password
    /// itself, since its log may show statements. Names are our own constants and a verifier holds no quote, so neither
    /// needs quoting.
    async fn role(&self, role: &str, password: &str) -> Result<(), StartError> {
        let duties = DUTIES.map(|duty| (duty, "nologin"));
        for (name, options) in duties.into_iter().chain([(role, "login")]) {
            let exists = self.client.query_opt("select from pg_roles where rolname = $1", &[&name]).await;
            if exists.map_err(failed("look up roles"))?.is_none() {
                self.run("make roles", &format!("create role {name} {options}")).await?;
            }
        }
        let verifier = scram_sha_256(password.as_bytes());
        self.run("make roles", &format!("alter role {role} login password '{verifier}'")).await
    }

    /// A database that only its owner may enter, unless told otherwise.
    async fn database(&self, name: &str, owner: &str) -> Result<(), StartError> {
        let exists = self.client.query_opt("select from pg_database where datname = $1", &[&name]).await;
        if exists.map_err(failed("look up databases"))?.is_none() {
            // A managed server's administrator must belong to a role to make it an owner; a superuser need not.
            self.run("make databases", &format!("grant {owner} to current_user")).await?;
            self.run("make databases", &format!("create database {name} owner {owner} template template0"))
                .await?;
        }
        self.run("close databases", &format!("revoke all on database {name} from public")).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_pgserver::{Binaries, Cluster, Server};

    fn server() -> Server {
        let mut say = |line: &str| eprintln!("{line}");
        let cluster = Cluster::open_scratch(Binaries::find().unwrap(), &mut say).unwrap();
        cluster.start(&mut say).unwrap()
    }

    fn url(home: &Home, file: &str) -> Config {
        fs::read_to_string(home.secret(file)).unwrap().trim().parse().unwrap()
    }

    #[tokio::test]
    async fn each_role_reaches_its_own_database_and_a_second_start_changes_nothing() {
        let server = tokio::task::spawn_blocking(server).await.unwrap();
        let admin = Session::open(&server.url("postgres").parse().unwrap()).await.unwrap();
        admin.run("log statements", "alter role current_user set log_statement = 'all'").await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut home = Home::at(dir.path().join(".weft"));
        home.create().unwrap();
        let databases =
            Databases { admin_url: server.url("postgres"), host: "127.0.0.1".into(), port: server.port() };
        databases.prepare(&home).await.unwrap();
        let first = fs::read_to_string(home.secret("shop.url")).unwrap();
        let shop = Session::open(&url(&home, "shop.url")).await.unwrap();
        shop.run("sell out", "delete from orders where id > 1").await.unwrap();

        databases.prepare(&home).await.unwrap();
        assert_eq!(fs::read_to_string(home.secret("shop.url")).unwrap(), first);
        let log = fs::read_to_string(server.cluster().log_file()).unwrap();
        assert!(log.contains("alter role shop login password 'SCRAM-SHA-256$"), "{log}");
        for file in ["controller.url", "reader.url", "shop.url"] {
            let password = url(&home, file).get_password().unwrap().to_owned();
            assert!(!log.contains(str::from_utf8(&password).unwrap()), "the log shows a password");
        }
        let orders: i64 = shop.client.query_one("select count(*) from orders", &[]).await.unwrap().get(0);
        assert_eq!(orders, 1, "what is there is not seeded again");

        let owner = Session::open(&url(&home, "controller.url")).await.unwrap();
        owner.run("own the database", "create schema mine").await.unwrap();
        let reader = Session::open(&url(&home, "reader.url")).await.unwrap();
        assert!(reader.run("write", "create schema mine_too").await.is_err());
        for (file, database) in [("shop.url", MESH), ("shop.url", "postgres"), ("reader.url", SHOP)] {
            let mut elsewhere = url(&home, file);
            elsewhere.dbname(database);
            let entered = Session::open(&elsewhere).await.is_ok();
            // Everybody may enter `postgres`, in which there is nothing.
            assert_eq!(entered, database == "postgres", "{file} in {database}");
        }
        tokio::task::spawn_blocking(move || server.stop().unwrap()).await.unwrap();
    }

    #[test]
    fn only_urls_of_one_reachable_host_are_taken() {
        let databases = Databases::of_url("postgres://a:b@db.example:5433/x").unwrap();
        assert_eq!((databases.host.as_str(), databases.port), ("db.example", 5433));
        assert!(Databases::of_url("mysql://a").is_err());
        assert!(Databases::of_url("postgres://a@%2Frun%2Fpg/x").is_err());
    }
}
