//! A guest's way to the session: what it has to tell, in order, into the one queue that all guests share.
//!
//! While that queue has room a report goes in at once. When it is full a guest asks for its turn, and the turns come
//! first come, first served, one report each: a guest that has ever more to tell cannot keep another's from being
//! heard.

use std::collections::VecDeque;

use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use crate::message::{Report, Turn};

/// Reports that wait for room at which the guest is not read from.
const WAITING_MAX: usize = 65_536;

/// What a guest has to tell.
pub(crate) struct Outlet {
    reports: Sender<Report>,
    waiting: VecDeque<Report>,
    has_asked: bool,
}

impl Outlet {
    pub(crate) fn new(reports: Sender<Report>) -> Self {
        Self {
            reports,
            waiting: VecDeque::new(),
            has_asked: false,
        }
    }

    /// Tells something after all that was told before; [`Self::flush`] sends it.
    pub(crate) fn push(&mut self, report: Report) {
        self.waiting.push_back(report);
    }

    /// Whether so much waits that no more should be caused.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX
    }

    /// Sends what there is room for. If there is none, `ask` is given the queue to wait for a turn in it, once.
    pub(crate) fn flush(&mut self, ask: impl FnOnce(Sender<Report>)) {
        // A place that falls free belongs to who has waited longest: no passing by.
        while !self.has_asked
            && let Some(report) = self.waiting.pop_front()
        {
            match self.reports.try_send(report) {
                Ok(()) => {}
                Err(TrySendError::Full(report)) => {
                    self.waiting.push_front(report);
                    self.has_asked = true;
                    return ask(self.reports.clone());
                }
                // The session is gone; so is the process, in a moment.
                Err(TrySendError::Closed(_)) => {}
            }
        }
    }

    /// The turn that was asked for has come.
    pub(crate) fn take(&mut self, turn: Turn) {
        self.has_asked = false;
        if let Some(place) = turn
            && let Some(report) = self.waiting.pop_front()
        {
            place.send(report);
        }
    }

    /// Sends everything, however long that takes.
    pub(crate) fn drain(&mut self) {
        while let Some(report) = self.waiting.pop_front() {
            if self.reports.blocking_send(report).is_err() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;
    use vnet_proto::model::VmId;

    use super::*;

    fn told_by(vm: u32) -> Report {
        Report::VmDown {
            vm: VmId(vm),
            link_error: None,
        }
    }

    fn teller(report: Report) -> u32 {
        let Report::VmDown { vm, .. } = report else {
            panic!("nothing else was told")
        };
        vm.0
    }

    #[tokio::test]
    async fn a_guest_that_floods_the_session_does_not_keep_another_from_being_heard() {
        let (reports, mut session) = mpsc::channel(4);
        let mut outlets = [Outlet::new(reports.clone()), Outlet::new(reports)];
        let (turns, mut come) = mpsc::unbounded_channel();
        let ask = |guest: usize| {
            let turns = turns.clone();
            move |queue: Sender<Report>| {
                tokio::spawn(async move {
                    let _ = turns.send((guest, queue.reserve_owned().await.ok()));
                });
            }
        };
        for _ in 0..1_000 {
            outlets[0].push(told_by(1));
        }
        outlets[0].flush(ask(0));
        tokio::task::yield_now().await;
        outlets[1].push(told_by(2));
        outlets[1].flush(ask(1));
        tokio::task::yield_now().await;

        let mut heard = Vec::new();
        while heard.len() < 1_001 {
            heard.push(teller(session.recv().await.unwrap()));
            tokio::task::yield_now().await;
            while let Ok((guest, turn)) = come.try_recv() {
                outlets[guest].take(turn);
                outlets[guest].flush(ask(guest));
            }
        }
        let place = heard.iter().position(|vm| *vm == 2).unwrap();
        assert!(place <= 6, "it was heard after {place} others");
    }

    #[tokio::test]
    async fn what_waits_keeps_its_order_and_a_session_that_is_gone_is_told_nothing() {
        let (reports, mut session) = mpsc::channel(1);
        let mut outlet = Outlet::new(reports);
        let mut asked = 0;
        for vm in 1..=3 {
            outlet.push(told_by(vm));
            outlet.flush(|_| asked += 1);
        }
        assert_eq!(asked, 1, "one turn is asked for at a time");
        assert_eq!(teller(session.try_recv().unwrap()), 1);
        outlet.flush(|_| asked += 1);
        assert!(session.try_recv().is_err(), "it waits for its turn");
        outlet.take(outlet.reports.clone().reserve_owned().await.ok());
        assert_eq!(teller(session.try_recv().unwrap()), 2);
        outlet.flush(|_| asked += 1);
        assert_eq!(teller(session.try_recv().unwrap()), 3);

        outlet.push(told_by(4));
        outlet.push(told_by(5));
        outlet.flush(|_| asked += 1);
        drop(session);
        outlet.take(None);
        outlet.flush(|_| asked += 1);
        assert_eq!((asked, outlet.waiting.len()), (2, 0));
    }

    #[test]
    fn at_the_limit_no_more_should_be_caused() {
        let (reports, _session) = mpsc::channel(1);
        let mut outlet = Outlet::new(reports);
        for _ in 0..WAITING_MAX {
            assert!(!outlet.is_full());
            outlet.push(told_by(1));
        }
        assert!(outlet.is_full());
    }
}
