//! What makes this a drop-in for gvproxy: its command line and its configuration file, up to one checked
//! [`Config`].
//!
//! - [`Flags::parse`] reads the command line in Go's syntax;
//! - [`FileConfig::parse`] reads the YAML of `-config`, with places;
//! - [`Config::resolve`] puts both together, with gvproxy's defaults and its checks, and reports everything that
//!   is wrong;
//! - [`load`] does all of it from the files that are named.
//!
//! Nothing here opens a socket or writes a file. What the configuration means is told in `docs/gvproxy.md`.

pub mod config;
pub mod flags;
mod load;
pub mod origin;
pub mod yaml;

pub use config::Config;
pub use flags::{FlagError, Flags};
pub use load::{Loaded, load};
pub use yaml::FileConfig;

/// The word that was probably meant, if one is near: a few letters off, whatever the case and the dashes.
fn nearest(found: &str, known: &[&'static str]) -> Option<&'static str> {
    // A long word is near to nothing, and comparing it is not worth its square.
    if found.len() > WORD_BYTES_MAX {
        return None;
    }
    let plain = |text: &str| -> String {
        let letters = text.chars().filter(|c| !matches!(c, '_' | '-'));
        letters.flat_map(char::to_lowercase).collect()
    };
    let found = plain(found);
    let near = known.iter().filter_map(|word| {
        let word_plain = plain(word);
        let distance = strsim::levenshtein(&found, &word_plain);
        // Of a word of two letters every other one is near.
        (distance <= word_plain.chars().count() / 3).then_some((distance, *word))
    });
    near.min_by_key(|(distance, _)| *distance).map(|(_, word)| word)
}

/// The longest word that is compared with others.
const WORD_BYTES_MAX: usize = 64;
