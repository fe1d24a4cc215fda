//! The processes of a mesh together: started in order, recorded for whoever may have to clean up, stopped in reverse.

use crate::child::{Child, ChildState, Exited, Recipe};
use crate::error::StartError;
use crate::home::Home;
use crate::leftover::{Records, Watchdog};
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Ends that nobody has asked about yet. More processes than a local mesh has; past it a process's task waits.
const EXITS_MAX: usize = 64;

#[derive(Debug)]
pub(crate) struct Supervisor {
    home: Home,
    children: Vec<Child>,
    records: Records,
    tasks: JoinSet<()>,
    report: mpsc::Sender<Exited>,
    exits: mpsc::Receiver<Exited>,
    watchdog: Watchdog,
}

impl Supervisor {
    /// One without processes, and the watchdog that will stop them should we be killed.
    pub(crate) fn new(home: &Home, weft: &Path) -> Result<Self, StartError> {
        let records = Records::own();
        let recording = records.save(home);
        recording.map_err(StartError::io(format!("writing {}", home.processes().display())))?;
        let watchdog =
            Watchdog::start(weft, home).map_err(StartError::io(format!("starting {}", weft.display())))?;
        let (report, exits) = mpsc::channel(EXITS_MAX);
        let (children, tasks) = (Vec::new(), JoinSet::new());
        Ok(Self { home: home.clone(), children, records, tasks, report, exits, watchdog })
    }

    /// Starts a process, in place of the one of the same name that has ended.
    pub(crate) fn start(&mut self, recipe: Recipe) -> Result<(), StartError> {
        let (child, task) = Child::start(recipe, self.report.clone())?;
        self.tasks.spawn(task);
        self.records.remove(&child.recipe.name);
        self.records.add(&child.recipe.name, child.pid);
        self.children.retain(|other| other.recipe.name != child.recipe.name);
        self.children.push(child);
        let saved = self.records.save(&self.home);
        saved.map_err(StartError::io(format!("writing {}", self.home.processes().display())))
    }

    pub(crate) fn children(&self) -> &[Child] {
        &self.children
    }

    pub(crate) fn child(&self, name: &str) -> Option<&Child> {
        self.children.iter().find(|child| child.recipe.name == name)
    }

    /// The next process that ends without having been asked to. Never, if none does.
    pub(crate) async fn next_exit(&mut self) -> Exited {
        match self.exits.recv().await {
            Some(exited) => exited,
            // We hold a sender ourselves.
            None => std::future::pending().await,
        }
    }

    /// Ends these processes at once, and returns those that had to be forced.
    pub(crate) async fn stop(&mut self, names: &[String], grace: Duration) -> Vec<String> {
        let mut forced = Vec::new();
        let mut stopping = JoinSet::new();
        let (stopped, kept) = std::mem::take(&mut self.children)
            .into_iter()
            .partition(|child| names.contains(&child.recipe.name));
        self.children = kept;
        for child in stopped {
            let child: Child = child;
            stopping.spawn(async move {
                let by_itself = child.state() != ChildState::Running || child.stop(grace).await;
                (child.recipe.name, by_itself)
            });
        }
        while let Some(Ok((name, by_itself))) = stopping.join_next().await {
            self.records.remove(&name);
            if !by_itself {
                forced.push(name);
            }
        }
        // What is still recorded is gone, which is seen from its start time; a failed write harms nothing.
        let _ = self.records.save(&self.home);
        forced
    }

    /// The end, after every process was stopped.
    pub(crate) async fn close(mut self) {
        while self.tasks.join_next().await.is_some() {}
        self.watchdog.dismiss();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::HOME_DIR;

    /// A supervisor whose watchdog is a program that waits for the end of its input and does nothing.
    fn supervisor() -> (tempfile::TempDir, Supervisor) {
        let dir = tempfile::tempdir().unwrap();
        let mut home = Home::at(dir.path().join(HOME_DIR));
        home.create().unwrap();
        let watchdog = dir.path().join("watchdog");
        std::fs::write(&watchdog, "#!/bin/sh\nread word\n").unwrap();
        std::fs::set_permissions(&watchdog, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let supervisor = Supervisor::new(&home, &watchdog).unwrap();
        (dir, supervisor)
    }

    fn shell(supervisor: &Supervisor, name: &str, script: &str) -> Recipe {
        Recipe {
            name: name.into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            log: supervisor.home.log(name),
        }
    }

    #[tokio::test]
    async fn a_child_that_dies_is_reported_with_the_end_of_its_log() {
        let (_dir, mut supervisor) = supervisor();
        supervisor.start(shell(&supervisor, "one", "echo last words; exit 3")).unwrap();
        let exited = supervisor.next_exit().await;
        assert_eq!((exited.name.as_str(), exited.status.code()), ("one", Some(3)));
        assert!(exited.to_string().contains("last words"), "{exited}");
        supervisor.close().await;
    }

    #[tokio::test]
    async fn a_child_that_is_stopped_is_no_news_and_a_stubborn_one_is_forced() {
        let (_dir, mut supervisor) = supervisor();
        supervisor.start(shell(&supervisor, "calm", "exec sleep 600")).unwrap();
        // It says when its handler stands.
        let script = "trap '' TERM; echo ready; while :; do sleep 600; done";
        supervisor.start(shell(&supervisor, "stubborn", script)).unwrap();
        let log = supervisor.home.log("stubborn");
        while !std::fs::read_to_string(&log).unwrap().contains("ready") {
            tokio::task::yield_now().await;
        }
        assert_eq!(supervisor.stop(&["calm".into()], Duration::from_secs(60)).await, Vec::<String>::new());
        let forced = supervisor.stop(&["stubborn".into()], Duration::from_millis(50)).await;
        assert_eq!(forced, ["stubborn"]);
        assert!(supervisor.exits.try_recv().is_err());
        supervisor.close().await;
    }

    #[tokio::test]
    async fn a_killed_child_can_be_started_again() {
        let (_dir, mut supervisor) = supervisor();
        let recipe = shell(&supervisor, "one", "exec sleep 600");
        supervisor.start(recipe.clone()).unwrap();
        supervisor.child("one").unwrap().signal(nix::sys::signal::Signal::SIGKILL).await;
        assert_eq!(supervisor.next_exit().await.name, "one");
        assert_ne!(supervisor.child("one").unwrap().state(), ChildState::Running);
        supervisor.start(recipe).unwrap();
        assert_eq!(supervisor.child("one").unwrap().state(), ChildState::Running);
        assert_eq!(supervisor.children().len(), 1);
        supervisor.stop(&["one".into()], Duration::from_secs(60)).await;
        supervisor.close().await;
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let (_dir, mut supervisor) = supervisor();
        let recipe = Recipe { program: "/nonexistent/weft-proxy".into(), ..shell(&supervisor, "one", "") };
        assert!(supervisor.start(recipe).unwrap_err().to_string().contains("/nonexistent/weft-proxy"));
        supervisor.close().await;
    }
}
