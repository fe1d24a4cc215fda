//! The controllers: which of them run, are paused, or are dead.

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;
use tokio::process::Child;
use tokio::time::{Instant, sleep_until};

use crate::controllers::Controller;

#[derive(Debug)]
pub(super) struct Fleet {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    controller: Controller,
    child: Child,
    /// When it goes on, if it is paused.
    until: Option<Instant>,
}

impl Fleet {
    /// Starts them one after the other: the first makes the certificate authority.
    pub(super) async fn start(controllers: Vec<Controller>) -> anyhow::Result<Self> {
        let mut members = Vec::new();
        for controller in controllers {
            let mut child = controller.spawn()?;
            controller.serves(&mut child).await?;
            members.push(Member { controller, child, until: None });
        }
        Ok(Self { members })
    }

    fn member(&mut self, name: &str) -> anyhow::Result<&mut Member> {
        let member = self.members.iter_mut().find(|member| member.controller.name == name);
        member.with_context(|| format!("there is no controller {name}"))
    }

    /// How many are neither paused nor dead.
    pub(super) fn awake(&self) -> usize {
        self.members.iter().filter(|member| member.until.is_none()).count()
    }

    pub(super) fn is_awake(&self, name: &str) -> bool {
        self.members.iter().any(|member| member.controller.name == name && member.until.is_none())
    }

    /// Stops a process where it is, for so long.
    pub(super) fn pause(&mut self, name: &str, length: Duration) -> anyhow::Result<()> {
        let member = self.member(name)?;
        member.signal(Signal::SIGSTOP)?;
        member.until = Some(Instant::now() + length);
        Ok(())
    }

    /// Lets those go on whose time is over.
    pub(super) fn resume_due(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        for member in self.members.iter_mut().filter(|member| member.until.is_some_and(|until| until <= now))
        {
            member.signal(Signal::SIGCONT)?;
            member.until = None;
        }
        Ok(())
    }

    /// Waits until so many are awake.
    pub(super) async fn wait_awake(&mut self, count: usize) -> anyhow::Result<()> {
        while self.awake() < count {
            let next = self.members.iter().filter_map(|member| member.until).min();
            sleep_until(next.context("too few controllers")?).await;
            self.resume_due()?;
        }
        Ok(())
    }

    pub(super) fn all(&self) -> usize {
        self.members.len()
    }

    pub(super) async fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        Ok(self.member(name)?.child.kill().await?)
    }

    /// Starts one again that was killed.
    pub(super) async fn start_again(&mut self, name: &str) -> anyhow::Result<()> {
        let member = self.member(name)?;
        member.child = member.controller.spawn()?;
        member.controller.serves(&mut member.child).await
    }

    /// Those that ended though nobody killed them, with what they said last.
    pub(super) fn ended(&mut self) -> anyhow::Result<Vec<String>> {
        let mut ended = Vec::new();
        for member in &mut self.members {
            if member.child.try_wait()?.is_some() {
                let Controller { name, .. } = &member.controller;
                ended.push(format!("{name} ended by itself: {}", member.controller.last_words()));
            }
        }
        Ok(ended)
    }
}

impl Member {
    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid =
            self.child.id().and_then(|id| i32::try_from(id).ok()).context("the controller has ended")?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }
}
