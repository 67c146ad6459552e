// Clips in step: they play, pause and begin again together, and the first one ahead waits for the others.
function inStep(clips, changed) {
  let wanted = false;
  const ready = () => clips.every((clip) => clip.readyState >= 2);
  const again = () => { for (const clip of clips) clip.currentTime = 0; };
  const set = (on) => {
    wanted = on;
    for (const clip of clips) {
      if (on) clip.preload = "auto";
      if (on && ready()) clip.play().catch(() => {});  // a page that is left while it loads
      else clip.pause();
    }
    changed(wanted);
  };
  for (const clip of clips) {
    clip.muted = true;
    clip.playsInline = true;
    clip.addEventListener("canplay", () => { if (wanted && ready()) set(true); });
    clip.addEventListener("ended", () => {
      if (wanted && clips.every((other) => other.ended)) { again(); set(true); }
    });
  }
  clips[0].addEventListener("timeupdate", () => {
    for (const other of clips.slice(1)) {
      if (!other.ended && !clips[0].ended && Math.abs(other.currentTime - clips[0].currentTime) > 0.1) {
        other.currentTime = clips[0].currentTime;
      }
    }
  });
  return { ready, play: () => set(true), pause: () => set(false), toggle: () => set(!wanted),
           replay: () => { again(); set(true); } };
}
