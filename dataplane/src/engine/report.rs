//! What the session is told: at once of what happens to a flow, once a second of what only counts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::Subject;

use crate::engine::cache::Decision;
use crate::engine::frame::DropReason;
use crate::engine::judge::Wanted;
use crate::engine::timer::Timer;
use crate::engine::transmit::Framing;
use crate::engine::{Engine, Event, Time};
use crate::message::{Report, VmStatus};

/// How often counts, refusals and status are reported, when they changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

impl Engine {
    pub(super) fn report(&mut self, report: Report) {
        self.events.push_back(Event::Report(Box::new(report)));
    }

    /// Counts a decision that the cache made, for the next report.
    pub(super) fn tally(&mut self, now: Time, wanted: &Wanted, decision: &Arc<Decision>) {
        let mut tally = std::mem::take(&mut self.tally);
        tally.count(wanted.target(), decision, || {
            Subject::Flow(self.subject(now, wanted))
        });
        self.tally = tally;
        self.want_report(now);
    }

    pub(super) fn want_report(&mut self, now: Time) {
        if !self.report_set {
            self.report_set = true;
            self.timers.set(now + REPORT_INTERVAL, Timer::Report);
        }
    }

    pub(super) fn handle_report_timeout(&mut self) {
        self.report_set = false;
        let mut counts = Vec::with_capacity(self.touched.len());
        for at in std::mem::take(&mut self.touched) {
            if let Some(flow) = self.flows.get_mut(at)
                && std::mem::replace(&mut flow.touched, false)
            {
                counts.push((flow.id, flow.bytes_up, flow.bytes_down));
            }
        }
        if !counts.is_empty() {
            self.report(Report::FlowStats(counts));
        }
        for report in self.tally.take(self.config.vm) {
            self.report(report);
        }
        for reached in self.dns.take_reached() {
            self.report(Report::LimitReached {
                vm: self.config.vm,
                limit: reached.limit.key(),
                subject: reached.domain,
                value: reached.value,
                count: reached.count,
            });
        }
        let counters = self.counters();
        if std::mem::take(&mut self.status_changed) || counters != self.counted {
            self.report_status(counters);
        }
    }

    /// Reports the guest's status as it is now.
    fn report_status(&mut self, counters: BTreeMap<String, u64>) {
        self.counted.clone_from(&counters);
        let dropped_frames: BTreeMap<String, u64> = DropReason::ALL
            .into_iter()
            .map(|reason| (reason.word().to_owned(), self.drops[reason as usize]))
            .filter(|(_, count)| *count != 0)
            .collect();
        self.report(Report::VmStatus(VmStatus {
            vm: self.config.vm,
            addresses: self
                .addresses
                .iter()
                .map(|v4| IpAddr::V4(*v4))
                .chain(self.addresses_ipv6.iter().map(|own| IpAddr::V6(own.address)))
                .collect(),
            mac: self.mac.map(|m| m.to_string()).unwrap_or_default(),
            claimed_hostname: self.claimed_hostname.clone(),
            leased_address: self.leased,
            dropped_frames,
            counters,
            attached: !self.transmit.is_closed(),
        }));
    }

    /// The link is gone, and the guest is expected back over another. Everything else goes on: clocks, verdicts, the
    /// host's side of its flows. The session is told at once.
    pub fn handle_link_lost(&mut self) {
        self.transmit.close();
        self.tell_status();
    }

    /// The guest is back, over a link whose frames have this framing.
    pub fn handle_link_back(&mut self, framing: Framing) {
        self.transmit.set_framing(framing);
        self.tell_status();
    }

    fn tell_status(&mut self) {
        self.status_changed = false;
        let counters = self.counters();
        self.report_status(counters);
    }

    /// Counts a frame that was not delivered.
    pub fn count_drop(&mut self, reason: DropReason) {
        self.count_drops(reason, 1);
    }

    /// Counts frames that were not delivered.
    pub fn count_drops(&mut self, reason: DropReason, count: u64) {
        self.drops[reason as usize] += count;
        self.note_status();
    }

    /// Something about the guest changed: say so with the next report.
    pub(super) fn note_status(&mut self) {
        self.status_changed = true;
        self.want_report(self.clock);
    }

    /// Frames not delivered, by reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }
}
