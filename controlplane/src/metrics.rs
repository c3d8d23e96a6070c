//! Every counter of the controlplane, in one place.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $name:ident => $metric:literal,)*) => {
        /// The counters.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[doc = $doc])+ pub $name: Counter,)*
        }

        impl Metrics {
            /// Every counter by its metric's name.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$(($metric, self.$name.get()),)*]
            }
        }
    };
}

metrics! {
    /// Misses received.
    misses => "vnet_controlplane_misses_total",
    /// Verdicts sent.
    verdicts => "vnet_controlplane_verdicts_total",
    /// Misses that joined a pending request.
    held => "vnet_controlplane_held_total",
    /// Misses denied because a limit of pending requests was reached.
    pending_refused => "vnet_controlplane_pending_refused_total",
    /// Forwards that nobody was asked about because as many of their VM waited for answers as may.
    forward_waits_refused => "vnet_controlplane_forward_waits_refused_total",
    /// Messages of dataplanes that were refused.
    malformed => "vnet_controlplane_malformed_messages_total",
    /// Messages of dataplanes that named a VM or flow that is not there.
    stray => "vnet_controlplane_stray_messages_total",
    /// Sessions that were ended because their dataplane read too slowly.
    sessions_overrun => "vnet_controlplane_sessions_overrun_total",
    /// Sessions that were ended because their dataplane fell silent.
    sessions_silent => "vnet_controlplane_sessions_silent_total",
    /// Captured packets that their clients were too slow for.
    capture_dropped => "vnet_controlplane_capture_dropped_total",
    /// Flows told to be cut.
    flows_cut => "vnet_controlplane_flows_cut_total",
    /// Flows, bindings or VMs that were not recorded because a limit was reached.
    limits_reached => "vnet_controlplane_limits_reached_total",
    /// Flows that a dataplane refused for the name that they spoke, or did not speak.
    names_refused => "vnet_controlplane_names_refused_total",
    /// Connections refused because of who made them.
    peers_refused => "vnet_controlplane_peers_refused_total",
    /// Of those, the ones that were hung up on without a word because as many were being told why as may.
    peers_unanswered => "vnet_controlplane_peers_unanswered_total",
    /// Watches refused because there are as many as there may be.
    watches_refused => "vnet_controlplane_watches_refused_total",
    /// Changes that a watch missed because its reader was too slow.
    changes_missed => "vnet_controlplane_changes_missed_total",
    /// Events made.
    events => "vnet_controlplane_events_total",
    /// Decisions counted in an event of others like them rather than told by themselves.
    events_counted => "vnet_controlplane_events_counted_total",
    /// Events that the history let go to make room for newer ones.
    events_let_go => "vnet_controlplane_events_let_go_total",
    /// Events that the history lost because its writer was behind.
    events_unrecorded => "vnet_controlplane_events_unrecorded_total",
    /// Writes to the store that failed.
    store_failures => "vnet_controlplane_store_failures_total",
    /// Changes that some dataplane did not acknowledge in time.
    changes_unacknowledged => "vnet_controlplane_changes_unacknowledged_total",
}
