//! The harness of the end-to-end tests: a host, an internet, servers, and `vnetctl` as a user types it.
//!
//! Every test runs on a stage of its own, made without root out of namespaces, so that tests can run
//! side by side and no packet leaves the machine:
//!
//! ```text
//!   libtest ──re-executes itself──▶ the test, in "host" namespaces          "internet" namespace
//!                                    203.0.113.1 ════════ veth ═══════════ 203.0.113.10, 198.51.100.7
//!                                    vnetctl run / up / approve ...          servers (threads), DNS on .10:53
//! ```
//!
//! ```no_run
//! use vnet_tests::{http, staged};
//!
//! #[test]
//! fn curl_reaches_a_server_that_is_allowed() {
//!     staged(curl_reaches_a_server_that_is_allowed, |world| {
//!         let server = http(world.internet(), "203.0.113.10:80");
//!         let run = world.run(&["--allow", "tcp 203.0.113.10:80"], &["curl", "-sS", "http://203.0.113.10/"]);
//!         let ended = run.wait();
//!         assert_eq!((ended.code, server.requests()), (0, 1), "{ended:?}");
//!     });
//! }
//! ```
//!
//! - [`staged`] takes the test function itself (for its name) and what the test does, given a [`World`];
//! - [`World::run`] starts `vnetctl run FLAGS -- COMMAND` and returns at once ([`Running`]);
//!   [`World::vnetctl`] runs any other command to its end ([`Ended`]); [`World::pending`] and
//!   [`World::json`] read lists; [`World::command`] is the general form, [`Person`] one at a terminal;
//! - [`http`], [`echo`], [`udp_echo`] and [`Dns`] serve on either side, and count; [`Authority`] is a DNS server with
//!   records of any type;
//! - [`Controlplane`] is one that a test starts and kills by hand, and [`Wire`] a session's way to it, which kills it
//!   at a message;
//! - [`eventually`] waits for a condition, [`descendants`] tells which processes are left.
//!
//! The programs under test are built by the harness with the profile and into the target directory of the
//! test itself (`cargo build --workspace --bins`, a moment when they are fresh), unless
//! `VNET_TEST_BINARIES` names a directory that has them. What must be installed is listed in
//! [`packages`]; what is missing fails every test with one message that names the packages.
#![cfg(target_os = "linux")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests and their tools say what they see"
)]

pub mod authority;
pub mod binaries;
pub mod controlplane;
pub mod dns;
pub mod notices;
pub mod packages;
pub mod person;
pub mod process;
#[cfg(target_arch = "x86_64")]
pub mod qemu;
pub mod servers;
pub mod sshd;
pub mod stage;
pub mod wire;
pub mod world;

pub use authority::Authority;
pub use controlplane::{Controlplane, misses};
pub use dns::{Answer, Dns};
pub use person::Person;
pub use process::{Ended, PATIENCE, Running, descendants, eventually};
pub use servers::{Server, echo, http, tcp, udp_echo};
pub use stage::{as_ordinary_user, staged, staged_with};
pub use wire::{Cut, Wire};
pub use world::{FIRST_MAC, World, id};
