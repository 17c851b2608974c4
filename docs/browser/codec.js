// Runs a codec in the browser: clips become codes and codes become audio, by ONNX Runtime, without a server.
"use strict";

const RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/";
const LONGEST = 30; // seconds
const BESIDE = { encoder: "encoder-from-audio.onnx", decoder: "decoder.onnx" };
const element = (id) => document.getElementById(id);

const state = { runtime: null, sessions: {}, about: null, source: null, clip: null, codes: null, decoding: null, recorder: null };

function say(text) {
  element("status").textContent = text;
}

/** Runs a task, and says what went wrong if something did. */
async function attempt(task) {
  try {
    await task();
  } catch (error) {
    say(`That did not work: ${error.message ?? error}`);
  }
}

// -- Programs

/** Reads the metadata of an ONNX file: field 14 of the outermost message, pairs of a key (1) and a value (2). */
function metadata(bytes) {
  const about = {};
  const text = new TextDecoder();
  let at = 0;
  const number = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = number();
    if (tag % 8 === 0) {
      number();
    } else if (tag % 8 === 2) {
      const end = number() + at;
      if (tag >> 3 === 14) {
        const pair = [];
        while (at < end) {
          number();
          const size = number();
          pair.push(text.decode(bytes.subarray(at, at + size)));
          at += size;
        }
        about[pair[0]] = pair[1];
      }
      at = end;
    } else {
      throw new Error("this is no ONNX program");
    }
  }
  return about;
}

async function runtime() {
  if (!state.runtime) {
    state.runtime = await import(`${RUNTIME}ort.wasm.min.mjs`);
    state.runtime.env.wasm.wasmPaths = RUNTIME;
    state.runtime.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  }
  return state.runtime;
}

async function loadProgram(part, name, data) {
  say(`Loading the ${part} …`);
  const bytes = new Uint8Array(await data);
  const about = metadata(bytes);
  if (!about.sample_rate) throw new Error(`${name} was not written by omnicodec export --format onnx`);
  const session = await (await runtime()).InferenceSession.create(bytes);
  const wanted = { encoder: ["input_values"], decoder: ["audio_codes"] }[part];
  if (session.inputNames.join() !== wanted.join()) {
    const what = { encoder: "encoder-from-audio", decoder: "decoder" }[part];
    throw new Error(`${name} takes ${session.inputNames.slice(0, 3).join(", ")}: export it as --what ${what}`);
  }
  const other = part === "encoder" ? "decoder" : "encoder";
  const replaced = state.sessions[other] && state.sessions[other].about.model !== about.model;
  if (replaced) {
    delete state.sessions[other];
    element(other).value = ""; // so that the same file can be chosen again
  }
  state.sessions[part] = { session, about };
  state.about = about;
  const slider = element("codebooks");
  slider.max = slider.value = about.num_quantizers;
  slider.disabled = false;
  if (replaced) return say(`Now choose the ${other}, too: the one before is of another model.`);
  await encode();
}

/** Loads the two programs that lie beside the page, those of the bundled codec. */
async function loadBeside() {
  state.sessions = {};
  for (const [part, name] of Object.entries(BESIDE)) {
    say(`Fetching the ${part} …`);
    const response = await fetch(name);
    if (!response.ok) throw new Error(`${name}: ${response.status}`);
    await loadProgram(part, name, response.arrayBuffer());
  }
}

/** Shows the button for them if they are there. A page that was opened from the disk may not look. */
async function lookBeside() {
  const found = await Promise.all(
    Object.values(BESIDE).map((name) => fetch(name, { method: "HEAD" }).then((response) => response.ok, () => false)),
  );
  element("beside").hidden = !found.every(Boolean);
}

// -- Clips

async function takeClip(data) {
  say("Reading the clip …");
  const context = new AudioContext();
  state.source = await context.decodeAudioData(data);
  await context.close();
  await encode();
}

/** The clip as the model takes it: mono, at its rate, scaled to its peak, and no longer than 30 seconds. */
async function prepared() {
  const rate = Number(state.about.sample_rate);
  const length = Math.ceil(Math.min(state.source.duration, LONGEST) * rate);
  const context = new OfflineAudioContext(1, length, rate);
  const player = context.createBufferSource();
  player.buffer = state.source;
  player.connect(context.destination);
  player.start();
  const samples = (await context.startRendering()).getChannelData(0);
  const peak = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
  if (peak < 1e-4) throw new Error("the clip is silent");
  const wanted = Number(state.about.input_peak);
  return wanted ? samples.map((sample) => (sample * wanted) / peak) : samples;
}

async function record() {
  const button = element("record");
  if (state.recorder) return state.recorder.stop();
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = (state.recorder = new MediaRecorder(stream));
  const parts = (state.recorded = []);
  const limit = setTimeout(() => recorder.stop(), LONGEST * 1000);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    clearTimeout(limit);
    stream.getTracks().forEach((track) => track.stop());
    state.recorder = null;
    button.textContent = "Record";
    attempt(async () => takeClip(await new Blob(parts).arrayBuffer()));
  };
  recorder.start();
  button.textContent = "Stop";
  say("Recording …");
}

// -- Codes and audio

async function encode() {
  const { encoder, decoder } = state.sessions;
  if (!encoder || !decoder) return say(`Now choose the ${encoder ? "decoder" : "encoder"}.`);
  if (!state.source) return say("Now choose or record a clip.");
  say("Encoding …");
  state.clip = await prepared();
  const tensor = new state.runtime.Tensor("float32", state.clip, [1, 1, state.clip.length]);
  const started = performance.now();
  const { audio_codes: codes } = await encoder.session.run({ input_values: tensor });
  state.codes = { values: codes.data, books: codes.dims[1], frames: codes.dims[2] };
  state.seconds = (performance.now() - started) / 1000;
  await decode();
}

async function decode() {
  const { values, books, frames } = state.codes;
  const count = Math.min(Number(element("codebooks").value), books);
  say(`Decoding ${count} of ${books} codebooks …`);
  // The decoder takes all codebooks; codes of -1 are left out.
  const chosen = values.map((value, i) => (i < count * frames ? value : -1n));
  const tensor = new state.runtime.Tensor("int64", chosen, [1, books, frames]);
  const started = performance.now();
  const { audio_values: audio } = await state.sessions.decoder.session.run({ audio_codes: tensor });
  const seconds = (performance.now() - started) / 1000;
  const rate = Number(state.about.sample_rate);
  const samples = audio.data.subarray(0, state.clip.length);
  state.decoded = samples;
  element("result").hidden = false;
  play("before", state.clip, rate);
  play("after", samples, rate);
  drawSpectrogram(element("before-picture"), state.clip);
  drawSpectrogram(element("after-picture"), samples);
  drawCodes(count);
  const length = state.clip.length / rate;
  say(
    `${length.toFixed(2)} s: ${frames} frames of ${count} of ${books} codebooks. ` +
      `Encoded in ${state.seconds.toFixed(2)} s, decoded in ${seconds.toFixed(2)} s.`,
  );
}

/** Decodes again when the slider has moved; moves during a run are one run after it. */
async function decodeAgain() {
  const count = element("codebooks").value;
  element("count").textContent = `the first ${count} of ${element("codebooks").max}`;
  if (!state.codes || state.decoding === "again") return;
  if (state.decoding) {
    state.decoding = "again";
    return;
  }
  do {
    state.decoding = "once";
    await attempt(decode);
  } while (state.decoding === "again");
  state.decoding = null;
}

// -- To hear and to see

/** Gives a player samples, as a WAV file of 16 bits. */
function play(id, samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const letters = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  letters(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  letters(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, sample)), true));
  const player = element(id);
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(new Blob([view], { type: "audio/wav" }));
}

/** Magnitudes of the first half of the spectrum of a power of two of samples. */
function spectrum(real) {
  const size = real.length;
  const imaginary = new Float32Array(size);
  for (let i = 1, j = 0; i < size; i++) {
    let bit = size >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [real[i], real[j]] = [real[j], real[i]];
  }
  for (let span = 2; span <= size; span *= 2) {
    for (let start = 0; start < size; start += span) {
      for (let k = 0; k < span / 2; k++) {
        const angle = (-2 * Math.PI * k) / span;
        const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
        const [a, b] = [start + k, start + k + span / 2];
        const [r, i] = [real[b] * cos - imaginary[b] * sin, real[b] * sin + imaginary[b] * cos];
        [real[b], imaginary[b]] = [real[a] - r, imaginary[a] - i];
        [real[a], imaginary[a]] = [real[a] + r, imaginary[a] + i];
      }
    }
  }
  return real.slice(0, size / 2).map((value, i) => Math.hypot(value, imaginary[i]));
}

/** Draws 80 dB below the loudest point, low frequencies at the bottom. */
function drawSpectrogram(canvas, samples) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const size = 2 * height;
  const columns = Array.from({ length: width }, (_, x) => {
    const start = Math.floor((x * Math.max(0, samples.length - size)) / width);
    const part = new Float32Array(size);
    part.set(samples.subarray(start, start + size));
    return spectrum(part.map((value, i) => value * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size))));
  });
  const loudest = Math.max(1e-6, ...columns.map((column) => column.reduce((a, b) => Math.max(a, b), 0)));
  const image = context.createImageData(width, height);
  columns.forEach((column, x) => {
    column.forEach((value, bin) => {
      const level = Math.max(0, 1 + Math.log10(Math.max(value / loudest, 1e-9)) / 4);
      image.data.set([255 * level ** 0.5, 255 * level ** 1.5, 120 * (1 - level) * level * 4, 255], 4 * ((height - 1 - bin) * width + x));
    });
  });
  context.putImageData(image, 0, 0);
}

/** Draws a point for each code, in a colour that its number gives it; those that are not decoded are dark. */
function drawCodes(count) {
  const { values, books, frames } = state.codes;
  const canvas = element("codes");
  [canvas.width, canvas.height] = [frames, books];
  const context = canvas.getContext("2d");
  for (let k = 0; k < books; k++) {
    for (let n = 0; n < frames; n++) {
      const hue = (Number(values[k * frames + n]) * 137.5) % 360;
      context.fillStyle = `hsl(${hue} 70% ${k < count ? 55 : 12}%)`;
      context.fillRect(n, k, 1, 1);
    }
  }
}

// -- Controls

for (const part of ["encoder", "decoder"]) {
  element(part).addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) attempt(() => loadProgram(part, file.name, file.arrayBuffer()));
  });
}
element("beside").addEventListener("click", () => attempt(loadBeside));
if (location.protocol !== "file:") lookBeside();
element("clip").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) attempt(async () => takeClip(await file.arrayBuffer()));
});
element("record").addEventListener("click", () => attempt(record));
element("codebooks").addEventListener("input", decodeAgain);

const drop = element("drop");
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    const [file] = event.dataTransfer.files;
    if (kind === "drop" && file) attempt(async () => takeClip(await file.arrayBuffer()));
  });
}
